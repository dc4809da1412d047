"""A page to try a model on: pictures or a clip in, questions, answers with their points, files out.

`backend` is the work, `page` what is seen of it, `models` and `samples` what it starts with.
"""
