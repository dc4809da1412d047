"""transformers' suites of configurations and models on the two Molmo2 models and the text model alone."""

import copy
import unittest

import pytest
import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers.models.auto import modeling_auto

import molmo2
from hf_common import tiny
from molmo2.configuration import Molmo2Config, Molmo2TextConfig
from molmo2.model.modeling import Molmo2ForConditionalGeneration, Molmo2Model, Molmo2TextModel

molmo2.register()
# The suites tell a bare model from one with a loss by these tables.
modeling_auto.MODEL_MAPPING_NAMES.setdefault("molmo2_text", "Molmo2TextModel")
modeling_auto.MODEL_MAPPING_NAMES["molmo2"] = "Molmo2Model"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["molmo2"] = "Molmo2ForConditionalGeneration"

TEXT_LENGTH = 7


class SizesTester(ConfigTester):
    """Without configurations of size 0, which are refused with the name of the setting."""

    def create_and_test_config_common_properties(self):
        config = self.config_class(**self.inputs_dict)
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            setattr(config, name, 4)
            assert getattr(config, name) == 4


class Sizes:
    """What the suites read about a model: settings of its text model, and its inputs."""

    base_model_class, causal_lm_class = Molmo2Model, Molmo2ForConditionalGeneration
    batch_size, seq_length = 3, 1 + len(tiny.image_ids()) + TEXT_LENGTH
    hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads = 32, 2, 4, 2
    intermediate_size, vocab_size, is_training = 37, tiny.VOCAB, True
    bos_token_id, eos_token_id, pad_token_id = tiny.BOS, tiny.EOS, tiny.PAD

    def __init__(self):
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self):
        return tiny.make_config()

    def words(self, length):
        return ids_tensor([self.batch_size, length], tiny.VOCAB - tiny.FIRST_WORD) + tiny.FIRST_WORD

    def prepare_config_and_inputs_for_common(self):
        images = torch.tensor([[tiny.BOS, *tiny.image_ids()]] * self.batch_size)
        input_ids = torch.cat([images, self.words(TEXT_LENGTH)], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "token_type_ids": torch.isin(input_ids, torch.tensor(tiny.VISUAL)).long(),
            **tiny.image_inputs(self.batch_size),
        }
        return self.get_config(), inputs


class TextSizes(Sizes):
    """The same for the text model."""

    base_model_class, causal_lm_class = Molmo2TextModel, None
    seq_length = 9

    def get_config(self):
        return tiny.make_config().text_config

    def prepare_config_and_inputs_for_common(self):
        input_ids = self.words(self.seq_length)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class Common(tiny.WithoutAutoMap, ModelTesterMixin):
    pipeline_model_mapping = {}
    all_generative_model_classes = ()
    is_encoder_decoder = False
    # for releases that still ask
    test_pruning = test_head_masking = test_torchscript = False

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and model_class is Molmo2ForConditionalGeneration:
            inputs["labels"] = torch.full_like(inputs["input_ids"], tiny.FIRST_WORD)
        return inputs


class Molmo2Test(Common, unittest.TestCase):
    all_model_classes = (Molmo2Model, Molmo2ForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = Sizes()
        self.config_tester = ConfigTester(self, config_class=Molmo2Config, has_text_modality=False)

    def _video_features_prepare_config_and_inputs(self):
        return self.model_tester.get_config(), tiny.video_inputs(self.model_tester.batch_size)

    def test_sdpa_can_dispatch_composite_models(self):
        """The suite looks for a vision tower by name; here every attention module is asked."""
        for model_class in self.all_model_classes:
            for asked in ("eager", "sdpa"):
                model = model_class._from_config(self.model_tester.get_config(), attn_implementation=asked)
                used = [own for own in model.modules() if type(own).__name__.endswith("Attention")]
                assert {own.config._attn_implementation for own in used} == {asked}
                assert len(used) == 4

    def test_mismatching_num_image_tokens(self):
        """The suite drops rows of each tensor; here an image has several of some, and is dropped whole."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        fewer = {**inputs, **tiny.image_inputs(self.model_tester.batch_size - 1)}
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            model(**copy.deepcopy(inputs))
            with pytest.raises(ValueError, match="patch token"):
                model(**fewer)


class Molmo2TextTest(Common, unittest.TestCase):
    all_model_classes = (Molmo2TextModel,)
    _is_composite = False

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = TextSizes()
        self.config_tester = SizesTester(self, config_class=Molmo2TextConfig, hidden_size=32)
