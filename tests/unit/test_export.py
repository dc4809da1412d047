"""`torch.export` of the three parts of the model, with free sizes: the same numbers as without."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from support.checkpoints import build_model
from support.model_inputs import batch

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=["qwen3", "olmo3"])
def model(request):
    return build_model(request.param).eval()


class Connector(nn.Module):
    """(patches, layers * width) features and (T, K) table -> (T, text width) vectors."""

    def __init__(self, backbone):
        super().__init__()
        self.pooling, self.projector = backbone.image_pooling_2d, backbone.image_projector

    def forward(self, features, token_pooling):
        return self.projector(self.pooling(features, token_pooling))


class Decoder(nn.Module):
    """(B, S, width) embeddings and (B, S) marks of visual tokens -> (B, S, vocabulary) logits."""

    def __init__(self, model):
        super().__init__()
        self.decoder, self.head = model.model.transformer, model.lm_head

    def forward(self, inputs_embeds, is_visual):
        states = self.decoder(inputs_embeds=inputs_embeds, is_visual=is_visual, use_cache=False).last_hidden_state
        return self.head(states)


def exported(module, arguments, *sizes):
    """The program, which is no longer the module: it holds a graph of torch's own operators."""
    with torch.no_grad():
        return export(module, arguments, dynamic_shapes=sizes, strict=False).module()


@torch.no_grad()
def test_vision_transformer(model):
    tower = model.model.vision_backbone.image_vit
    crops = batch("two images")["pixel_values"]
    program = exported(tower, (crops,), {0: Dim("crops", min=1, max=512)})
    for pixels in (crops[:1], torch.cat([crops, crops.flip(0)])):
        expected = tower(pixels)
        found = program(pixels)
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, **TOLERANCE)


@torch.no_grad()
def test_connector(model):
    backbone = model.model.vision_backbone
    inputs = batch("image")
    features, table = backbone.encode_crops(inputs["pixel_values"]), inputs["image_token_pooling"]
    connector = Connector(backbone)
    sizes = {0: Dim("patches", min=2, max=1 << 20)}, {0: Dim("tokens", min=2, max=4096)}
    program = exported(connector, (features, table), *sizes)
    for given in (table, table[:5], torch.cat([table, table.flip(0)])):
        torch.testing.assert_close(program(features, given), connector(features, given), **TOLERANCE)


@torch.no_grad()
def test_text_decoder_with_the_mask_of_the_training(model):
    decoder = Decoder(model)
    width = model.config.text_config.hidden_size
    free = {0: Dim("rows", min=1, max=64), 1: Dim("tokens", min=16, max=1024)}  # fewer tokens take another path
    given = torch.randn(2, 20, width), torch.zeros(2, 20, dtype=torch.bool)
    program = exported(decoder, given, free, free)
    for rows, tokens in ((1, 16), (3, 33), (1, 700)):  # the last is longer than a block of queries
        embeds = torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(tokens))
        is_visual = torch.zeros(rows, tokens, dtype=torch.bool)
        is_visual[:, 3:9] = True
        found = program(embeds, is_visual)
        torch.testing.assert_close(found, decoder(embeds, is_visual), **TOLERANCE)
        causal = decoder(embeds, torch.zeros_like(is_visual))
        assert (found - causal).abs().max() > 1e-3  # visual tokens see each other in the program too
