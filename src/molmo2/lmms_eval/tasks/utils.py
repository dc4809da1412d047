"""The functions that the tasks name; lmms-eval reads this file beside them."""

from molmo2.lmms_eval.questions import task

image_points, image_points_text, image_points_scores = task("allenai/pixmo-points-eval")
image_count, image_count_text, image_count_scores = task("allenai/pixmo-count")
pointbench, pointbench_text, pointbench_scores = task("PointArena/pointarena-data")
video_points, video_points_text, video_points_scores = task("allenai/Molmo2-VideoPointEval")
video_count, video_count_text, video_count_scores = task("allenai/Molmo2-VideoCountEval")
video_tracks, video_tracks_text, video_tracks_scores = task("allenai/Molmo2-VideoTrackEval")
