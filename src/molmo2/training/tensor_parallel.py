"""Tensor parallelism: each process holds its heads and its part of every feed-forward network (Shoeybi et al. 2019).

    distributed.init_process_group()        # in processes that torchrun started
    model = tensor_parallel(model)
    loss = model(**batch).loss              # of the same batch in all processes: the same loss in all of them

`att_proj` holds rows of q, k and v, `ff_proj` those of value and gate, so a process gets rows out of each. The
styles of transformers for fused matrices cut them into pieces of equal length, which suits value and gate alone: under
grouped-query attention q has more rows than k, and a process would get queries without the keys that they share.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from molmo2.training.collectives import Ranks, clip_to_norm, enter_parts, gather_parts, leave_parts, sum_parts

Spans = list[tuple[int, int]]
DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout", "image_feature_dropout")
LAYOUT = "molmo2_layout"  # attribute of a model that is cut


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut over processes.

    Attributes:
        dim, size: The dimension that is cut, and its whole length.
        spans: For each process, the (start, end) that it holds, one after the other. Key heads that several processes
            need are in the spans of each.
    """

    dim: int
    size: int
    spans: list[Spans]

    def part(self, tensor: Tensor, index: int) -> Tensor:
        """What the process `index` holds of a tensor, copied."""
        return torch.cat([tensor.narrow(self.dim, start, end - start) for start, end in self.spans[index]], self.dim)

    def lengths(self) -> list[int]:
        """What each process holds along the dimension."""
        return [sum(end - start for start, end in spans) for spans in self.spans]

    def put(self, whole: Tensor, part: Tensor, index: int) -> None:
        """Write what the process `index` holds into the whole tensor."""
        place = 0
        for start, end in self.spans[index]:
            whole.narrow(self.dim, start, end - start).copy_(part.narrow(self.dim, place, end - start))
            place += end - start

    def empty(self, part: Tensor) -> Tensor:
        """Zeros in the shape of the whole tensor."""
        shape = list(part.shape)
        shape[self.dim] = self.size
        return part.new_zeros(shape)

    def is_shared(self) -> bool:
        """Whether some entries are held by several processes."""
        return sum(self.lengths()) > self.size


@dataclass(frozen=True)
class Layout:
    """What was cut of a model: `cuts` by the names of parameters, over `ranks`."""

    ranks: Ranks
    cuts: dict[str, Cut]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor, on the CPU, or this one if it is not cut."""
        cut = self.cuts.get(name)
        if cut is None:
            return part.detach().to("cpu", copy=True)
        whole = cut.empty(part)
        for index, each in enumerate(self.ranks.all_parts(part, cut.dim, cut.lengths())):
            cut.put(whole, each, index)
        return whole.cpu()


def tensor_parallel(model: nn.Module, group: Any = None) -> nn.Module:
    """Cut a model, which is the same in all processes, into their parts.

    Attention is cut by heads, feed-forward networks, projector and output matrix by rows and columns, the embedding by
    its width; norms, position vectors and biases of sums stay whole. Losses, logits and gradients are those of the
    whole model as long as all processes get the same batches. Parameters keep their names. All processes must call
    `save_pretrained`, which writes whole tensors from the first one. Freeze and unfreeze parameters before: gradients
    of those that several processes hold are added only if they were wanted when the model was cut.

    Args:
        model: Molmo2, or its text model or vision backbone alone; not shared with DDP or FSDP over the same processes.
        group: The processes that share it, by default all.
    Returns:
        `model` itself.
    Raises:
        ValueError: torch.distributed is not initialised, heads do not divide, a linear layer is another module (of
            adapters or quantisation), a weight is no plain tensor (quantisation, FSDP), some dropout is not 0, or the
            model is cut already.
    """
    ranks = Ranks(group)
    if hasattr(model, LAYOUT):
        raise ValueError("The model is cut over processes already; load it anew to cut it otherwise.")
    if ranks.size == 1:
        return model
    plan = _Plan(model, ranks)
    plan.carry_out()
    setattr(model, LAYOUT, Layout(ranks, plan.cuts))
    if hasattr(model, "save_pretrained"):
        pretrained: Any = model
        pretrained.save_pretrained = functools.partial(_save, model, pretrained.save_pretrained)
        pretrained.resize_token_embeddings = _refuse_resizing
    return model


def _layout(model: nn.Module) -> Layout:
    layout = getattr(model, LAYOUT, None)
    if layout is None:
        raise ValueError("The model is not cut over processes: call `tensor_parallel(model)` first.")
    return layout


def full_state_dict(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of the whole model on the CPU, by their published names; all processes must call it.

    Args:
        state_dict: Parts that take the place of the model's own, such as averages of them.
    """
    layout = _layout(model)
    parts = model.state_dict() if state_dict is None else state_dict
    return {name: layout.whole(name, part) for name, part in parts.items()}


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the whole model on the CPU, by the names of parameters; all processes must call it."""
    layout = _layout(model)
    return {
        name: layout.whole(name, parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients down to a norm, that of the whole model; all processes must call it.

    `torch.nn.utils.clip_grad_norm_` would take the norm of a process's part, and scale each part by another factor.

    Returns:
        The norm before, 0-d float32.
    """
    layout = _layout(model)
    found = [(name, each.grad) for name, each in model.named_parameters() if each.grad is not None]
    squares = torch.zeros(2, device=found[0][1].device if found else None)  # of what is cut, of what is not
    for name, gradient in found:
        cut = layout.cuts.get(name)
        own = gradient.float() ** 2
        if cut is not None and cut.is_shared():
            own = own / _holders(own, cut, layout.ranks)
        squares[0 if cut is not None else 1] += own.sum()
    norm = (layout.ranks.sum(squares[0]) + squares[1]).sqrt()
    return clip_to_norm([gradient for _, gradient in found], norm, max_norm)


def _holders(part: Tensor, cut: Cut, ranks: Ranks) -> Tensor:
    """How many processes hold each entry of a part, in a shape that broadcasts to it."""
    count = torch.zeros(cut.size, device=part.device)
    for spans in cut.spans:
        for start, end in spans:
            count[start:end] += 1
    shape = [1] * part.dim()
    shape[cut.dim] = -1
    return Cut(0, cut.size, cut.spans).part(count, ranks.index).view(shape)


def _save(model: nn.Module, save: Callable, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` with whole tensors, from the first process; what fails there is raised in all.

    Raises:
        RuntimeError: The first process, which raises its own error, could not save.
    """
    layout = _layout(model)
    given = inspect.signature(save).bind(*args, **kwargs)
    given.arguments["state_dict"] = full_state_dict(model, given.arguments.get("state_dict"))
    failure: list[str | None] = [None]
    error = None
    if layout.ranks.index == 0:
        try:
            save(*given.args, **given.kwargs)
        except Exception as caught:
            error, failure = caught, [f"{type(caught).__name__}: {caught}"]
    distributed.broadcast_object_list(failure, layout.ranks.global_rank(0), layout.ranks.group)
    if error is not None:
        raise error
    if failure[0] is not None:
        raise RuntimeError(f"The first process could not save the model: {failure[0]}")


def _refuse_resizing(*args: Any, **kwargs: Any) -> None:
    raise ValueError("The embedding is cut over processes: resize it before `tensor_parallel`.")


# --- the plan --------------------------------------------------------------------------------------------------------


def head_spans(heads: int, key_heads: int, processes: int, name: str) -> tuple[list[Spans], list[Spans]]:
    """The query heads and the key heads of each process: the key heads that its queries share, and no others.

    With fewer key heads than processes, several processes hold the same one.

    Raises:
        ValueError: The heads of `name` do not divide.
    """
    shared = heads // key_heads  # consecutive query heads with one key head
    if key_heads >= processes:
        whole, left = divmod(key_heads, processes)
        ends = [(index + 1) * whole + min(index + 1, left) for index in range(processes)]
        keys = list(zip([0, *ends], ends))
        return [[(start * shared, end * shared)] for start, end in keys], [[span] for span in keys]
    if processes % key_heads or heads % processes:
        raise ValueError(
            f"{name} has {heads} query heads and {key_heads} key heads, which {processes} processes cannot share. "
            f"Take at most {key_heads} processes, or a multiple of {key_heads} that divides {heads}."
        )
    own, copies = heads // processes, processes // key_heads
    queries = [[(index * own, (index + 1) * own)] for index in range(processes)]
    return queries, [[(index // copies, index // copies + 1)] for index in range(processes)]


def _stacked(spans: list[list[Spans]], sizes: list[int], unit: int = 1) -> Cut:
    """The cut of matrices that lie on one another: their spans, in rows of `unit`, and their sizes."""
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    joined = [
        [(start + unit * low, start + unit * high) for start, own in zip(starts, of_rank) for low, high in own]
        for of_rank in zip(*spans)
    ]
    return Cut(0, sum(sizes), joined)


class _Plan:
    """What is to be cut, and what is to be done to modules; nothing is changed before all has been checked."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.model, self.ranks = model, ranks
        self.cuts: dict[str, Cut] = {}
        self.sums: list[str] = []  # parameters whose gradient is a sum over processes
        self.actions: list[Callable[[], Any]] = []
        rules = {
            "Molmo2Attention": self.text_attention,
            "Molmo2MLP": self.text_mlp,
            "Molmo2VisionAttention": self.vision_attention,
            "Molmo2Pooling": self.vision_attention,
            "Molmo2VisionMLP": functools.partial(self.mlp, columns=("w1",), rows="w2"),
            "Molmo2Projector": functools.partial(self.mlp, columns=("w1", "w3"), rows="w2"),
            "Molmo2Embedding": self.embedding,
        }
        for name, module in model.named_modules():
            rule: Any = rules.get(type(module).__name__)  # by name: checkpoints bring classes of their own
            if rule is not None:
                self.require_no_dropout(name, module)
                rule(name, module)
        if hasattr(model, "lm_head"):
            self.head(model.lm_head)
        if not self.cuts:
            raise ValueError(f"Nothing to cut was found in a {type(model).__name__}: pass a Molmo2 model.")
        parameters = dict(model.named_parameters())
        for name in self.cuts:
            found = type(parameters[name].data)
            if found is not Tensor:
                raise ValueError(
                    f"'{name}' is a {found.__name__}; expected a plain tensor. Cut the model before quantisation or "
                    "FSDP replaces its weights."
                )

    def carry_out(self) -> None:
        parameters = dict(self.model.named_parameters())
        for name, cut in self.cuts.items():
            owner, _, own_name = name.rpartition(".")
            whole = parameters[name]
            part = nn.Parameter(cut.part(whole.detach(), self.ranks.index), requires_grad=whole.requires_grad)
            setattr(self.model.get_submodule(owner), own_name, part)
            if cut.is_shared() and part.requires_grad:  # a hook on another one is an error
                part.register_hook(functools.partial(_sum_shared, cut=cut, ranks=self.ranks))
        for name in self.sums:
            if parameters[name].requires_grad:
                parameters[name].register_hook(self.ranks.sum)
        for action in self.actions:
            action()

    def require_no_dropout(self, name: str, module: Any) -> None:
        config = getattr(module, "config", None)
        found = {each: getattr(config, each, 0.0) for each in DROPOUTS if getattr(config, each, 0.0)}
        if found:
            raise ValueError(f"Processes would drop different entries of '{name}': set {found} to 0.")

    def linear(self, name: str, module: Any) -> Any:
        """The layer, if it is one that can be cut."""
        if type(module) is not nn.Linear:
            raise ValueError(
                f"'{name}' is a {type(module).__name__}; expected nn.Linear. Cut the model before adapters or "
                "quantisation replace its layers: adapters on a model that is cut are not supported."
            )
        return module

    def columns(self, name: str, module: Any, cut: Cut) -> None:
        """A layer of which each process computes some outputs."""
        self.linear(name, module)
        self.cuts[f"{name}.weight"] = cut
        if module.bias is not None:
            self.cuts[f"{name}.bias"] = cut

    def rows(self, name: str, module: Any, spans: list[Spans]) -> None:
        """A layer of which each process reads some inputs; the outputs are added."""
        self.linear(name, module)
        self.cuts[f"{name}.weight"] = Cut(1, module.in_features, spans)
        self.actions.append(lambda: setattr(module, "forward", functools.partial(_row_linear, module, self.ranks)))

    def enters(self, module: nn.Module, *layers: str) -> None:
        """The input of a module is that of parts; its layers, checked in each pass, must stay what they are."""
        hook = functools.partial(_enter, ranks=self.ranks, layers=layers)
        self.actions.append(lambda: module.register_forward_pre_hook(hook))

    def spread(self, length: int) -> list[Spans]:
        return [[bounds] for bounds in self.ranks.bounds(length)]

    def heads(self, name: str, module: Any) -> tuple[list[Spans], list[Spans]]:
        """The heads of each process; the module gets the numbers of its own."""
        queries, keys = head_spans(module.num_heads, module.num_key_value_heads, self.ranks.size, name)
        (query_start, query_end), (key_start, key_end) = queries[self.ranks.index][0], keys[self.ranks.index][0]
        own = {"num_heads": query_end - query_start, "num_key_value_heads": key_end - key_start}
        own["num_key_value_groups"] = own["num_heads"] // own["num_key_value_heads"]
        self.actions.append(lambda: vars(module).update(own))
        return queries, keys

    def text_attention(self, name: str, module: Any) -> None:
        queries, keys = self.heads(name, module)
        size, all_heads = module.head_dim, (module.num_heads, module.num_key_value_heads)
        sizes = [size * all_heads[0], size * all_heads[1], size * all_heads[1]]
        self.columns(f"{name}.att_proj", module.att_proj, _stacked([queries, keys, keys], sizes, size))
        query_cut, key_cut = (_stacked([each], [size * of], size) for each, of in zip((queries, keys), all_heads))
        self.rows(f"{name}.attn_out", module.attn_out, query_cut.spans)
        widths = tuple(cut.lengths()[self.ranks.index] for cut in (query_cut, key_cut, key_cut))
        self.actions.append(lambda: setattr(module, "widths", widths))
        for norm, cut in (("q_norm", query_cut), ("k_norm", key_cut)):
            own = getattr(module, norm)
            if own is None:
                continue
            if module.norms_heads:
                self.sums.append(f"{name}.{norm}.weight")
                continue
            self.cuts[f"{name}.{norm}.weight"] = cut
            forward = functools.partial(_norm_of_all, own, self.ranks, cut.size, sum(cut.lengths()) / cut.size)
            self.actions.append(functools.partial(setattr, own, "forward", forward))
        self.enters(module, "att_proj", "attn_out")

    def text_mlp(self, name: str, module: Any) -> None:
        width = self.linear(f"{name}.ff_out", module.ff_out).in_features
        own = self.spread(width)
        self.columns(f"{name}.ff_proj", module.ff_proj, _stacked([own, own], [width, width]))
        self.rows(f"{name}.ff_out", module.ff_out, own)
        self.enters(module, "ff_proj", "ff_out")

    def vision_attention(self, name: str, module: Any) -> None:
        queries, keys = self.heads(name, module)
        for layer, spans, number in (
            ("wq", queries, module.num_heads),
            ("wk", keys, module.num_key_value_heads),
            ("wv", keys, module.num_key_value_heads),
        ):
            cut = _stacked([spans], [number * module.head_dim], module.head_dim)
            self.columns(f"{name}.{layer}", getattr(module, layer), cut)
            if layer == "wq":
                self.rows(f"{name}.wo", module.wo, cut.spans)
        self.enters(module, "wq", "wk", "wv", "wo")

    def mlp(self, name: str, module: Any, columns: tuple[str, ...], rows: str) -> None:
        width = self.linear(f"{name}.{rows}", getattr(module, rows)).in_features
        for layer in columns:
            self.columns(f"{name}.{layer}", getattr(module, layer), Cut(0, width, self.spread(width)))
        self.rows(f"{name}.{rows}", getattr(module, rows), self.spread(width))
        self.enters(module, *columns, rows)

    def embedding(self, name: str, module: Any) -> None:
        cut = Cut(1, module.embedding_dim, self.spread(module.embedding_dim))
        self.cuts |= {f"{name}.embedding": cut, f"{name}.new_embedding": cut}
        self.gathers(module, cut)

    def head(self, module: Any) -> None:
        self.linear("lm_head", module)
        cut = Cut(0, module.out_features, self.spread(module.out_features))
        self.columns("lm_head", module, cut)
        self.enters(module)
        self.gathers(module, cut)

    def gathers(self, module: nn.Module, cut: Cut) -> None:
        """The outputs of all processes, side by side, are the output of a module."""

        def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            return gather_parts(output, self.ranks, output.dim() - 1, cut.lengths(), sums_gradient=False)

        self.actions.append(lambda: module.register_forward_hook(hook))


# --- what modules do -------------------------------------------------------------------------------------------------


def _enter(module: nn.Module, inputs: tuple[Any, ...], ranks: Ranks, layers: tuple[str, ...]) -> tuple[Any, ...]:
    for layer in layers:
        if type(getattr(module, layer)) is not nn.Linear:
            raise ValueError(
                f"'{layer}' of a {type(module).__name__} became a {type(getattr(module, layer)).__name__} after "
                "`tensor_parallel`: adapters on a model that is cut are not supported."
            )
    entered: dict[int, Tensor] = {}
    for each in inputs:
        if isinstance(each, Tensor) and each.is_floating_point() and id(each) not in entered:
            entered[id(each)] = enter_parts(each, ranks)
    return tuple(entered.get(id(each), each) for each in inputs)


def _row_linear(module: Any, ranks: Ranks, inputs: Tensor) -> Tensor:
    """A linear layer on a part of its inputs: the sum over processes, with the bias added once."""
    total = leave_parts(nn.functional.linear(inputs, module.weight), ranks)
    return total if module.bias is None else total + module.bias


def _norm_of_all(module: Any, ranks: Ranks, size: int, copies: float, states: Tensor) -> Tensor:
    """A root-mean-square norm over a width of which each process has a part; `copies` have each entry."""
    wide = states if states.dtype == torch.float64 else states.float()
    mean = sum_parts(wide.square().sum(-1, keepdim=True) / copies, ranks) / size
    return module.weight * (wide * torch.rsqrt(mean + module.eps)).to(states.dtype)


def _sum_shared(gradient: Tensor, cut: Cut, ranks: Ranks) -> Tensor:
    """The gradient of a part, with those of other processes that hold the same entries added."""
    whole = cut.empty(gradient)
    cut.put(whole, gradient, ranks.index)
    return cut.part(ranks.sum(whole), ranks.index)
