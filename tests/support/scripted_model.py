"""A stand-in for a model that knows its answers: what a random model can't say goes through the real processor."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


class ScriptedModel:
    """Writes the answer that `script(prompt)` gives for each row, token by token, as `generate` would.

    Attributes:
        calls: The prompts of each call of `generate`, decoded, visual tokens included.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, processor: Any, script: Callable[[str], str] | dict[str, str]):
        self.processor = processor
        self._script = script if callable(script) else lambda prompt: _lookup(script, prompt)
        tokenizer = processor.tokenizer
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        self.calls: list[list[str]] = []

    def eval(self) -> "ScriptedModel":
        return self

    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int = 512, streamer=None, stopping_criteria=(), **_: Any
    ) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        prompts = tokenizer.batch_decode(input_ids)
        self.calls.append(prompts)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        answers = [
            [*tokenizer.encode(self._script(prompt), add_special_tokens=False), eos][:max_new_tokens]
            for prompt in prompts
        ]
        length = max(map(len, answers))
        output = input_ids
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for place in range(length):
            column = torch.tensor([[answer[place] if place < len(answer) else pad] for answer in answers])
            output = torch.cat([output, column], dim=1)
            if streamer is not None:
                streamer.put(column[:, 0])
            for criterion in stopping_criteria:
                criterion(output, None)
        if streamer is not None:
            streamer.end()
        return output


def _lookup(answers: dict[str, str], prompt: str) -> str:
    """The answer whose question stands last in the prompt."""
    places = {prompt.rfind(question): answer for question, answer in answers.items() if question in prompt}
    return places[max(places)]


class DictatedModel:
    """A real model that is told what to say: caches, streams and stopping are its own, only the tokens are given.

    Args:
        before_token: Called with the answer so far before each token, to hold the model or to look at the outside.

    Attributes:
        prompts: What was asked, decoded, the last one last.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        script: Callable[[str], str] | dict[str, str],
        before_token: Callable[[str], object] = lambda text: None,
    ):
        self._model, self._tokenizer, self._before_token = model, processor.tokenizer, before_token
        self._script = script if callable(script) else lambda prompt: _lookup(script, prompt)
        self.prompts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        tokenizer = self._tokenizer
        prompts = tokenizer.batch_decode(input_ids)
        self.prompts += prompts
        answers = [
            [*tokenizer.encode(self._script(prompt), add_special_tokens=False), tokenizer.eos_token_id]
            for prompt in prompts
        ]

        def dictate(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            place = ids.shape[1] - input_ids.shape[1]
            self._before_token(tokenizer.decode(ids[0, input_ids.shape[1] :]))
            wanted = [answer[place] if place < len(answer) else tokenizer.pad_token_id for answer in answers]
            told = torch.full_like(scores, -torch.inf)
            told[range(len(wanted)), wanted] = 0.0
            return told

        return self._model.generate(input_ids=input_ids, **options, logits_processor=[dictate])
