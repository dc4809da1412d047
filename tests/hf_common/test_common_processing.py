"""transformers' suites of processors, image processors and video processors on those of Molmo2.

Overridden is what counts rows of tensors: crops, frames and pooling indices of all images come flat, one after the
other. Media come from here, because those of the suites are on the Hub, and are bright, so that mean pixel values tell
whether a step was obeyed.
"""

import shutil
import tempfile
import unittest
from pathlib import Path

import av
import numpy as np
import tests.test_image_processing_common as image_suite
import tests.test_processing_common as processor_suite
import tests.test_video_processing_common as video_suite
from PIL import Image
from transformers import AutoTokenizer

import molmo2
from hf_common import tiny
from molmo2.image.processing import Molmo2ImageProcessor
from molmo2.processing.processor import Molmo2Processor
from molmo2.video.processing import Molmo2VideoProcessor
from support.golden_cases import GOLDEN

molmo2.register()

MEAN = [0.5, 0.5, 0.5]
SIZE = {"height": 56, "width": 56}
IMAGE_OPTIONS = {"size": SIZE, "max_crops": 2, "overlap_margins": [1, 1], "pooling_size": [2, 2]}
VIDEO_OPTIONS = {"size": SIZE, "num_frames": 4, "pooling_size": [3, 3]}
TEMPLATE = Path(__file__).parents[2].joinpath("chat_template.jinja").read_text(encoding="utf-8")
PROCESSORS = {"image_processor": Molmo2ImageProcessor, "video_processor": Molmo2VideoProcessor}


def write_media(folder):
    """Two images and two clips of 30 frames at 10 per second."""
    files = {"images": [], "videos": [], "audio": []}
    for number in range(2):
        files["images"].append(str(folder / f"{number}.png"))
        Image.fromarray(bright((60, 80, 3))).save(files["images"][-1])
        files["videos"].append(str(folder / f"{number}.mp4"))
        with av.open(files["videos"][-1], "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for shade in range(0, 240, 8):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return files


def bright(shape):
    return np.random.default_rng(0).integers(200, 255, shape, dtype=np.uint8)


class Molmo2ProcessorTest(tiny.WithoutAutoMap, processor_suite.ProcessorTesterMixin, unittest.TestCase):
    processor_class = Molmo2Processor
    image_token, video_token = "<|image|>", "<|video|>"
    full_tmpdirname = None

    @classmethod
    def setUpClass(cls):
        cls.tmpdirname = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.tmpdirname, ignore_errors=True)  # older releases remove it themselves
        cls.files = write_media(Path(cls.tmpdirname))
        processor_suite.MODALITY_INPUT_DATA.update(cls.files)
        processor_suite.url_to_local_path = lambda url: cls.files["videos" if url.endswith("mp4") else "images"][0]
        parts = {"image_processor": Molmo2ImageProcessor(**IMAGE_OPTIONS)}
        parts["video_processor"] = Molmo2VideoProcessor(**VIDEO_OPTIONS)
        parts["tokenizer"] = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
        Molmo2Processor(**parts, chat_template=TEMPLATE).save_pretrained(cls.tmpdirname)

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": TEMPLATE}

    def get_component(self, attribute, use_tiny_ckpt=True, **options):
        if attribute == "tokenizer":
            return AutoTokenizer.from_pretrained(self.tmpdirname, **options)
        return PROCESSORS[attribute].from_pretrained(self.tmpdirname, **options)

    def prepare_image_inputs(self, batch_size=None, nested=False):
        image = Image.fromarray(bright((30, 400, 3)))
        return image if batch_size is None else [[image] if nested else image] * batch_size

    def prepare_video_inputs(self, batch_size=None):
        video = bright((8, 3, 30, 400))
        return video if batch_size is None else [video] * batch_size

    prepare_images_inputs, prepare_videos_inputs = prepare_image_inputs, prepare_video_inputs  # of newer releases

    def _test_apply_chat_template(self, modality, batch_size, return_tensors, input_name, processor_name, input_data):
        """Messages with media as prompts and as inputs, with as many rows as there are crops and frames."""
        if modality == "audio":
            self.skipTest("Molmo2 has no audio input")
        processor, name = self.get_processor(), getattr(self, input_name)
        media = {"type": modality, "url": input_data[0]}
        turns = [[{"role": "user", "content": [media, {"type": "text", "text": "What is this?"}]}]] * batch_size
        prompts = processor.apply_chat_template(turns, add_generation_prompt=True)
        assert [prompt.count(f"<|{modality}|>") for prompt in prompts] == [1] * batch_size
        call = {"tokenize": True, "return_dict": True, "return_tensors": return_tensors, "add_generation_prompt": True}
        inputs = processor.apply_chat_template(turns, **call, processor_kwargs={"num_frames": 2, "padding": True})
        assert len(inputs["input_ids"]) == len(inputs["attention_mask"]) == batch_size
        rows = inputs["image_num_crops"].sum() if modality == "image" else inputs["video_grids"][:, 0].sum()
        assert len(inputs[name]) == int(rows)
        answered = [[*own, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}] for own in turns]
        for prompt in processor.apply_chat_template(answered, continue_final_message=True):
            assert prompt.endswith("It is")
        text = [[{"role": "user", "content": [{"type": "text", "text": "Hello there."}]}]] * batch_size
        cut = {"padding": "max_length", "truncation": True, "max_length": 9}
        inputs = processor.apply_chat_template(text, **call, processor_kwargs=cut)
        assert [len(row) for row in inputs["input_ids"]] == [9] * batch_size

    def test_apply_chat_template_video_frame_sampling(self):
        processor = self.get_processor()
        part = {"type": "video", "url": self.files["videos"][0]}
        turn = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
        for count in (2, 3):
            inputs = processor.apply_chat_template(
                turn, tokenize=True, return_dict=True, return_tensors="pt", num_frames=count
            )
            assert inputs["video_grids"].tolist() == [[count, 2, 2]]
            assert len(inputs[self.videos_input_name]) == count


class Molmo2ImageProcessorTest(tiny.WithoutAutoMap, image_suite.ImageProcessingTestMixin, unittest.TestCase):
    # the first name is that of older releases
    image_processing_class = Molmo2ImageProcessor
    fast_image_processing_class = None
    image_processor_tester_class = staticmethod(lambda parent: parent)  # its two methods stand below
    image_processing_classes = {"torchvision": Molmo2ImageProcessor}
    image_processor_dict = {**IMAGE_OPTIONS, "image_mean": MEAN, "image_std": MEAN, "do_convert_rgb": True}
    test_slow_image_processor, test_fast_image_processor = True, False
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.image_processor_tester = self

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        return image_suite.prepare_image_inputs(4, 30, 120, 3, equal_resolution, numpify, torchify)

    def prepare_image_processor_dict(self):
        return dict(self.image_processor_dict)

    def check_calls(self, **form):
        processor, images = Molmo2ImageProcessor(**self.image_processor_dict), self.prepare_image_inputs(**form)
        for given, count in ((images[0], 1), (images, 4), ([[image] for image in images], 4)):
            outputs = processor(given, return_tensors="pt")
            crops = outputs["image_num_crops"]
            assert outputs["pixel_values"].shape == (int(crops.sum()), 16, 588)
            assert len(crops) == len(outputs["image_grids"]) == count

    def test_call_pil(self):
        self.check_calls()

    def test_call_numpy(self):
        self.check_calls(numpify=True)

    def test_call_pytorch(self):
        self.check_calls(torchify=True)


class Molmo2VideoProcessorTest(tiny.WithoutAutoMap, video_suite.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = Molmo2VideoProcessor
    video_processor_dict = {**VIDEO_OPTIONS, "image_mean": MEAN, "image_std": MEAN, "do_convert_rgb": True}
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.video_processor_tester = self

    def prepare_video_processor_dict(self):
        return dict(self.video_processor_dict)

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return video_suite.prepare_video_inputs(3, 8, 3, 32, 80, equal_resolution, return_tensors)

    def check(self, videos, frames, **options):
        """As many frames of each of the videos."""
        outputs = Molmo2VideoProcessor(**self.video_processor_dict)(videos, return_tensors="pt", **options)
        assert outputs["video_grids"].tolist() == [[own, 2, 2] for own in frames]
        assert outputs[self.input_name].shape == (sum(frames), 16, 588)
        assert outputs["video_token_pooling"].shape == (4 * sum(frames), 9)

    def check_calls(self, kind):
        videos = self.prepare_video_inputs(return_tensors=kind)
        self.check(videos[0], [8], do_sample_frames=False)
        self.check(videos, [8] * 3, do_sample_frames=False)

    def test_call_pil(self):
        self.check_calls("pil")

    def test_call_numpy(self):
        self.check_calls("np")

    def test_call_pytorch(self):
        self.check_calls("torch")

    def test_nested_input(self):
        videos = [list(video) for video in self.prepare_video_inputs(return_tensors="np")]
        self.check(videos[0], [8], do_sample_frames=False)
        self.check(videos, [8] * 3, do_sample_frames=False)

    def test_call_sample_frames(self):
        videos = self.prepare_video_inputs(return_tensors="torch")
        metadata = [{"total_num_frames": 8, "fps": 4, "duration": 2.0}] * 3
        self.check(videos[0], [8], do_sample_frames=False, num_frames=3)
        self.check(videos, [3] * 3, do_sample_frames=True, num_frames=3, video_metadata=metadata)

    def test_video_processor_from_dict_with_kwargs(self):
        """The suite gives a size in one number, which stays square here."""
        changed = Molmo2VideoProcessor.from_dict(self.video_processor_dict, size={"height": 84, "width": 84})
        assert changed.size == {"height": 84, "width": 84}
        assert Molmo2VideoProcessor.from_dict(self.video_processor_dict, size=42).size == {"height": 42, "width": 42}
