"""Rows as the published data sets have them: the same columns, types and units, with made-up contents."""

VIDEO_POINT = {
    "video_id": "vid1",
    "video_source": "youtube",
    "video_duration": 20.0,
    "clip_start": 4.0,
    "clip_end": 12.0,
    "label": "red cups",
    "question": "How many red cups are on the table?",
    "count": 3,
    "category": "object",
    "two_fps_timestamps": [4.5, 6.0],
    "points": [[{"x": 50.0, "y": 20.0}, {"x": 10.0, "y": 90.0}], [{"x": 99.9, "y": 0.0}]],
    "annotator_unsure": False,
}
VIDEO_TRACK = {
    "id": "t1",
    "video": "v.mp4",
    "clip": "c.mp4",
    "fps": 4,
    "video_dataset": "APTv2",
    "start_frame": 0,
    "end_frame": 4,
    "exp": "two dogs",
    "w": 200,
    "h": 100,
    "mask_id": ["m0", "m1"],
    "points": [
        {"object_id": "m1", "points": [None, None, [20.0, 10.0], None, [40.0, 20.0]]},
        {"object_id": "m0", "points": [[100.0, 50.0], [1.0, 1.0], [120.0, 50.0], None, None]},
    ],
}


def _seen(frame, *points):
    return {
        "frame": frame,
        "time": frame / 6,
        "points": [{"id": number, "point": at, "occluded": hidden} for number, at, hidden in points],
    }


ACADEMIC = {
    "id": "a1",
    "video": "v.mp4",
    "expression": "the dogs",
    "fps": 6,
    "sampling_fps": 2,
    "height": 100,
    "width": 200,
    "n_frames": 10,
    "task": "track",
    "frame_trajectories": [
        _seen(0, (0, [100.0, 50.0], False)),
        _seen(1, (0, [0.0, 0.0], False)),
        _seen(3, (0, [120.0, 50.0], False), (1, [20.0, 10.0], True)),
        _seen(6, (0, [140.0, 50.0], False), (1, [40.0, 20.0], False)),
    ],
    "mask_id": ["0", "1"],
    "obj_id": [0, 1],
    "qid": "q",
    "anno_id": ["x"],
}
SINGLE = {
    **ACADEMIC,
    "task": "single_point_track",
    "frame_trajectories": [_seen(3, (7, [120.0, 50.0], False)), _seen(6, (7, [140.0, 50.0], False))],
}
MULTI_IMAGE_POINT = {
    "image_urls": [f"http://images/{number}.jpg" for number in range(7)],
    "image_sha256s": ["0"] * 7,
    "points": [[{"x": 10.0 * number, "y": 50.0}] * (number % 3) for number in range(7)],
    "counts": [number % 3 for number in range(7)],
    "labels": ["dog", "dogs", "The dog", "dog", "dog", "cat", "dog"],
    "collection_method": ["pointing"] * 7,
}
CAPTION = {
    "video_id": "vid1",
    "video_start": 0.0,
    "video_end": 10.0,
    "video_caption": "Short.",
    "merged_caption": "Merged.",
    "video_frame_merged_caption": "Long.",
    "annotation_score": 4,
}
CAPTION_QA = {
    "video_id": "vid1",
    "Question": "What is it?",
    "Answer": "A cup",
    "NegativeAnswers": ["A car", "A cat", "A cow"],
    "Category": None,
}
SUBTITLE_QA = {
    **CAPTION_QA,
    "subtitle": [{"start": 0.0, "end": 1.5, "text": "Hello."}, {"start": 60.0, "end": 61.0, "text": "Bye."}],
}
USER_QA = {"video_id": "vid1", "question": "Why?", "answer": "Because."}
MULTI_IMAGE_QA = {
    "image_urls": ["http://images/1.jpg", "http://images/2.jpg"],
    "qa_pairs": {"question": ["How many cups?", "Which is larger?"], "answer": ["3", "The second."]},
}
SYNTHETIC_QA = {
    "id": "s1",
    "images": ["chart one", "chart two"],
    "qa_pairs": {"question": ["Which?"], "explanation": ["It is higher."], "answer": ["The first"]},
    "metadata": {"num_images": 2},
}
PIXMO_POINTS = {
    "image_url": "http://images/1.jpg",
    "label": "boats",
    "count": 2,
    "points": [{"x": 50.0, "y": 20.0}, {"x": 10.0, "y": 90.0}],
    "collection_method": "counting",
}
PIXMO_COUNT = {  # in pixels of an image of 200 by 100
    "image_url": "http://images/1.jpg",
    "label": "boats",
    "count": 2,
    "points": {"x": [100.0, 20.0], "y": [20.0, 90.0]},
}
EXPLANATION = {  # the mark in the answer is an assumption of the reader
    "image_url": "http://images/1.jpg",
    "question": "Is it a harbour?",
    "parsed_response": "Yes: <|POINT|> lie beside <|POINT|>.",
    "points": [[{"x": 50.0, "y": 20.0}, {"x": 10.0, "y": 90.0}], [{"x": 99.9, "y": 0.0}]],
    "inline_text": ["boats", "a pier"],
    "alt_text": ["moored boats", None],
}
LOCAL_MULTI_POINT = {
    "images": [f"pixmo/{number}.jpg" for number in range(7)],
    "normalized_labels": ["dog", "dog", "dog", "dog", "dog", "cat", "dog"],
    "points": MULTI_IMAGE_POINT["points"],
}
PIXMO_CAP = {"image_url": "http://images/1.jpg", "caption": "x" * 1500, "transcripts": ["y" * 600]}
PIXMO_CAP_QA = {
    "image_url": "http://images/1.jpg",
    "question": "[USER] What is it? [ASSISTANT] A boat. [USER] Which colour?",
    "answer": "Red.",
}
COSYN_POINT = {
    "id": "c1",
    "image": "an image",
    "questions": ["Where is the bar?"],
    "answer_points": [{"x": [50.0], "y": [25.0]}],
    "names": ["bar"],
}
TULU = {
    "id": "x",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ],
    "source": "s",
    "category": "c",
    "has_special_token": False,
}
HARDCODES = {"questions": ["Who are you?", "Your name?"], "response": "Molmo2.", "images": []}

ROWS = {
    "allenai/Molmo2-Cap": CAPTION,
    "allenai/Molmo2-VideoCapQA": CAPTION_QA,
    "allenai/Molmo2-VideoSubtitleQA": SUBTITLE_QA,
    "allenai/Molmo2-AskModelAnything": USER_QA,
    "allenai/Molmo2-VideoPoint": VIDEO_POINT,
    "allenai/Molmo2-VideoTrack": VIDEO_TRACK,
    "allenai/Molmo2-MultiImageQA": MULTI_IMAGE_QA,
    "allenai/Molmo2-SynMultiImageQA": SYNTHETIC_QA,
    "allenai/Molmo2-MultiImagePoint": MULTI_IMAGE_POINT,
    "allenai/molmo2-mevis": ACADEMIC,
    "allenai/pixmo-cap": PIXMO_CAP,
    "allenai/pixmo-points": PIXMO_POINTS,
    "allenai/pixmo-count": PIXMO_COUNT,
    "allenai/pixmo-point-explanations": EXPLANATION,
    "allenai/molmo2-pixmo-multi-points": LOCAL_MULTI_POINT,
    "allenai/pixmo-cap-qa": PIXMO_CAP_QA,
    "allenai/pixmo-ask-model-anything": {"image_url": "http://images/1.jpg", "question": "Why?", "answer": "So."},
    "allenai/CoSyn-400K": {**SYNTHETIC_QA, "image": "a chart", "images": None},
    "allenai/CoSyn-point": COSYN_POINT,
    "allenai/molmo2-tulu4-classified": TULU,
    "allenai/molmo2-hardcodes": HARDCODES,
}
