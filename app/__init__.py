"""A demo page: images or a video, questions, answers with their points, files to download.

`backend` is the logic, `page` the user interface, `models` and `samples` load the model and the examples.
"""

MAX_FRAMES = 384  # of a video, as in training; visitors may choose
