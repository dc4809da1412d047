"""The embedding table in two pieces, and what resizing makes of it."""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


class Molmo2Embedding(nn.Embedding):
    """One lookup table in two pieces: the base vocabulary, then the ids that were added for Molmo2.

    An `nn.Embedding` for tools that ask. Tools that write to `weight`, such as a merge of adapters, need one piece:
    `resize_token_embeddings` joins the two.
    """

    def __init__(self, vocab_size: int, additional_vocab_size: int, hidden_size: int):
        nn.Module.__init__(self)  # that of nn.Embedding would make one table
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.new_embedding = nn.Parameter(torch.empty(additional_vocab_size, hidden_size))

    @property
    def num_embeddings(self) -> int:  # type: ignore[override]  # attributes of nn.Embedding
        """Rows of both pieces."""
        return self.embedding.shape[0] + self.new_embedding.shape[0]

    @property
    def embedding_dim(self) -> int:  # type: ignore[override]
        return self.embedding.shape[1]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Both pieces as one (rows, D) tensor: a copy, for tools that inspect it; `forward` never makes it.

        After resizing there is one piece, and this is its parameter.
        """
        return torch.cat((self.embedding, self.new_embedding)) if len(self.new_embedding) else self.embedding

    def extra_repr(self) -> str:  # that of nn.Embedding reads instance attributes
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def reset_parameters(self) -> None:
        """Draws both pieces anew, as `nn.Embedding` does with its table."""
        nn.init.normal_(self.embedding)
        nn.init.normal_(self.new_embedding)

    def join(self, table: Tensor) -> None:
        """Takes (rows, D) as the base vocabulary; the second piece, kept for the names on disk, has no rows then."""
        trains = self.embedding.requires_grad
        self.embedding = nn.Parameter(table.detach(), requires_grad=trains)
        self.new_embedding = nn.Parameter(table.new_empty(0, table.shape[1]), requires_grad=trains)

    def take_shapes(self, state_dict: dict[str, Any] | None, files: Iterable[str] | None) -> None:
        """Makes room, without values, for the same rows cut elsewhere, as a state dict or safetensors files have them.

        The library's own Molmo2 class has one table, and saves it cut into halves under the names of the two pieces.
        """
        shapes = {name: list(tensor.shape) for name, tensor in (state_dict or {}).items()}
        for path in () if state_dict else files or ():
            if str(path).endswith(".safetensors"):
                with safe_open(path, framework="pt") as file:
                    names = [name for name in list(file.keys()) if ".wte." in f".{name}"]
                    shapes |= {name: file.get_slice(name).get_shape() for name in names}
        by_end = {".".join(name.split(".")[-2:]): shape for name, shape in shapes.items()}
        found = [by_end[name] for name in ("wte.embedding", "wte.new_embedding") if name in by_end]
        is_cut_elsewhere = len(found) == 2 and found[0] != list(self.embedding.shape)
        if is_cut_elsewhere and found[0][0] + found[1][0] == self.num_embeddings:
            self.embedding, self.new_embedding = (nn.Parameter(self.embedding.new_empty(shape)) for shape in found)

    def cut_at(self, num_rows: int) -> None:
        """Moves the cut: `num_rows` rows in the base vocabulary. Parameters stay, with what loaders note on them."""
        if num_rows != len(self.embedding) and len(self.new_embedding):
            base, new = self.weight.detach().split((num_rows, self.num_embeddings - num_rows))
            self.embedding.data, self.new_embedding.data = base.clone(), new.clone()

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) ids to (B, S, D); only the rows asked for are touched."""
        base_size = self.embedding.shape[0]
        if not self.new_embedding.shape[0]:
            return nn.functional.embedding(input_ids, self.embedding)
        is_new = input_ids >= base_size
        base = nn.functional.embedding(input_ids.masked_fill(is_new, 0), self.embedding)
        new = nn.functional.embedding((input_ids - base_size).clamp(min=0), self.new_embedding)
        return torch.where(is_new[..., None], new, base)
