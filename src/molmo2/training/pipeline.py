"""Pipeline parallelism: each process holds some of the layers, and passes its hidden states on (Huang et al. 2019).

    distributed.init_process_group()        # in processes that torchrun started
    pipeline = Pipeline(model)
    loss = pipeline.forward_backward([first_batch, second_batch])   # the same batches in all processes

The first process has the vision backbone and the embedding, the last one the output matrix. All batches of a step go
forward, then all of them backward, so processes work at the same time on different batches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from molmo2.model.vision_inputs import MEDIA_INPUTS
from molmo2.training.collectives import Ranks, clip_to_norm

LABELS = ("labels", "loss_weights", "num_items_in_batch")


class _RemoteLayer(nn.Module):
    """A layer that another process holds: hidden states go through it unchanged."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """(B, S, D), and no attention weights."""
        return hidden_states, None


class _RemoteEmbedding(nn.Module):
    """The embedding that the first process holds: zeros, which the received hidden states replace."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) ids to (B, S, D) without memory of their own."""
        return torch.zeros((), device=input_ids.device, dtype=self.dtype).expand(*input_ids.shape, self.width)


class Pipeline:
    """The layers of this process, and the steps that all processes take together.

    Parameters keep their names; those of other processes are gone from the model. So the model itself refuses, by a
    ValueError, to be called, to generate and to be saved: `forward` and `forward_backward` take batches, and
    `full_state_dict` has the tensors of all.

    Args:
        model: `Molmo2ForConditionalGeneration`, the same in all processes; it is changed. Pass `input_ids` in batches.
        group: The processes that share it, by default all.
        layers: Text layers of each process, by default as equal as possible; fewer for the first one, which has the
            vision backbone too, even out the times.
    Raises:
        ValueError: torch.distributed is not initialised, or `layers` do not add up.
    """

    def __init__(self, model: Any, group: Any = None, layers: Sequence[int] | None = None):
        self.ranks, self.model = Ranks(group), model
        index, text = self.ranks.index, model.model.transformer
        depth = len(text.blocks)
        counts = [end - start for start, end in self.ranks.bounds(depth)] if layers is None else list(layers)
        if len(counts) != self.ranks.size or sum(counts) != depth or min(counts) < 1:
            raise ValueError(
                f"`layers` is {counts}; expected a positive number for each of {self.ranks.size} process(es), "
                f"{depth} together."
            )
        self.is_first, self.is_last = index == 0, index == self.ranks.size - 1
        start = sum(counts[:index])
        self.width = text.config.hidden_size
        self.dtype = text.ln_f.weight.dtype
        for layer in range(depth):
            if not start <= layer < start + counts[index]:
                text.blocks[layer] = _RemoteLayer()
        if not self.is_first:
            text.wte = _RemoteEmbedding(self.width, self.dtype)
            model.model.vision_backbone = _RemoteLayer()
            model.model._media_features = model.model._require_media = lambda *_: None
        if not self.is_last:
            text.ln_f = model.lm_head = nn.Identity()
        self._received: Tensor | None = None
        self._is_passing = False
        text.emb_drop.register_forward_hook(lambda _module, _inputs, states: self._stage_input(states))
        for part in (model, model.model):
            part.register_forward_pre_hook(lambda *_: self._require_pass())
        model.generate = self._refuse_generating
        model.save_pretrained = self._refuse_saving

    def _stage_input(self, states: Tensor) -> Tensor:
        return states if self._received is None else self._received

    def _require_pass(self) -> None:
        if not self._is_passing:
            raise ValueError(
                "This process holds some of the layers only: call `pipeline.forward` or `pipeline.forward_backward`."
            )

    @staticmethod
    def _refuse_generating(*_: Any, **__: Any) -> None:
        raise ValueError(
            "This process holds some of the layers only, and passes nothing on while answering: build the model anew "
            "from `pipeline.full_state_dict()` to generate."
        )

    @staticmethod
    def _refuse_saving(*_: Any, **__: Any) -> None:
        raise ValueError("This process holds some of the layers only: save `pipeline.full_state_dict()`.")

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
        """Take a batch through the layers of this process; all processes must call it.

        Returns:
            The hidden states that came from the process before, None in the first; and the model's output in the last
            process, in others (B, S, D), which were sent on.
        """
        given = {name: value for name, value in batch.items() if self.is_first or name not in MEDIA_INPUTS}
        if not self.is_first:
            states = torch.empty(*batch["input_ids"].shape, self.width, dtype=self.dtype, device=self._device())
            distributed.recv(states, self._neighbour(-1), group=self.ranks.group)
            self._received = states.requires_grad_(torch.is_grad_enabled())
        received = self._received
        self._is_passing = True
        try:
            if self.is_last:
                return received, self.model(**given, use_cache=False)
            own = {name: value for name, value in given.items() if name not in LABELS}
            states = self.model.model(**own, use_cache=False).last_hidden_state
        finally:
            self._received, self._is_passing = None, False
        distributed.send(states.detach().contiguous(), self._neighbour(1), group=self.ranks.group)
        return received, states

    def forward_backward(
        self, batches: Sequence[Mapping[str, Any]], num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """Add the gradients of a step; all processes must call it with the same batches.

        Args:
            num_items_in_batch: Labels, or the sum of loss weights, of all batches; by default the loss is the mean of
                the batches' losses.
        Returns:
            The loss of the step, 0-d, in all processes.
        """
        outputs = []
        for batch in batches:
            counted = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            outputs.append(self.forward({**batch, **counted}))
        total = torch.zeros((), device=self._device())
        for received, output in outputs:
            if self.is_last:
                loss = output.loss if num_items_in_batch is not None else output.loss / len(batches)
                loss.backward()
                total += loss.detach().float()
            else:
                gradient = torch.empty_like(output)
                distributed.recv(gradient, self._neighbour(1), group=self.ranks.group)
                output.backward(gradient)
            if received is not None:
                to_previous: Any = received.grad
                distributed.send(to_previous.contiguous(), self._neighbour(-1), group=self.ranks.group)
        distributed.broadcast(total, self.ranks.global_rank(self.ranks.size - 1), self.ranks.group)
        return total

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale gradients down to a norm, that of all layers; all processes must call it.

        `torch.nn.utils.clip_grad_norm_` would take the norm of a process's layers.

        Returns:
            The norm before, 0-d float32.
        """
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        squares = torch.zeros((), device=self._device())
        for gradient in gradients:
            squares += (gradient.float() ** 2).sum()
        return clip_to_norm(gradients, self.ranks.sum(squares).sqrt(), max_norm)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The tensors of the whole model on the CPU, by their published names; all processes must call it."""
        own = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        shapes: list[Any] = [None] * self.ranks.size
        described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
        distributed.all_gather_object(shapes, described, group=self.ranks.group)
        found = {}
        for index, of_process in enumerate(shapes):
            for name, (shape, dtype) in of_process.items():
                tensor = (
                    own[name] if index == self.ranks.index else torch.empty(shape, dtype=dtype, device=self._device())
                )
                distributed.broadcast(tensor.contiguous(), self.ranks.global_rank(index), group=self.ranks.group)
                found[name] = tensor.cpu()
        return found

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _neighbour(self, step: int) -> int:
        return self.ranks.global_rank(self.ranks.index + step)
