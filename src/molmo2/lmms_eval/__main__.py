"""Prints the folder of the tasks: lmms-eval ... --include_path $(python -m molmo2.lmms_eval)"""

from molmo2.lmms_eval import TASKS

print(TASKS)
