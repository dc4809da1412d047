"""A worker for `molmo2.batch.pool` without a model: answers at once, and does to itself what a question says.

die         ends the process, as a decoder that crashes does
hang        answers never
print       writes to stdout what is no line of the protocol

Its first argument, if there is one, is a file that gets the number of the process, a line for each window; the second
one a number of workers: none answers before that number of workers have a window.
"""

import json
import os
import sys
import time

output = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def send(**message):
    try:
        output.write(json.dumps(message) + "\n")
        output.flush()
    except OSError:
        os._exit(1)


def workers_in(path):
    with open(path) as log:
        return {line for line in log if line.endswith("\n")}


first = json.loads(sys.stdin.readline() or os._exit(1))
if first["settings"]["model"] == "missing":
    send(failed="OSError: there is no such model")
    sys.exit(1)
send(ready=True)
for line in sys.stdin:
    rows = json.loads(line)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "a") as log:
            log.write(f"{os.getpid()}\n")
        end = time.monotonic() + 240
        while len(sys.argv) > 2 and len(workers_in(sys.argv[1])) < int(sys.argv[2]):
            if time.monotonic() > end:
                os._exit(1)
            time.sleep(0.02)
    for row in rows:
        send(busy=[row["number"]])
        if row["question"] == "die":
            os.kill(os.getpid(), 9)
        if row["question"] == "hang":
            time.sleep(1000)
        if row["question"] == "print":
            print("library noise")
        answer = {"text": row["question"].upper(), "points": [], "count": None, "truncated": False}
        asked = {name: row[name] for name in ("question", "images", "videos")}
        send(result={"row": row["number"], "id": row["id"], **asked, **answer, "error": None})
