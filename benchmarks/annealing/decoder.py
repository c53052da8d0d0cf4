"""A small decoder for the random design: half the time of a library's model at these sizes, where its parts are tiny.

Pre-norm with RMSNorm (arXiv 1910.07467), learned positions, GELU, tied embeddings; its mixture of experts sends a token
to two of four (Mixtral, arXiv 2401.04088). It knows no text and no optimizer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB_SIZE = 256
_HEAD = 16
_EXPERTS, _CHOSEN, _BALANCE = 4, 2, 0.02


class Decoder(nn.Module):
    """Predicts the next byte.

    Args:
        width: Size of the hidden states, a multiple of 16.
        depth: Number of layers.
        block_length: Most bytes at once.
        family: "dense" or "moe".
        dropout: After the embedding and on attention weights.
    """

    def __init__(self, *, width: int, depth: int, block_length: int, family: str, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, width)
        self.embed_positions = nn.Embedding(block_length, width)
        self.layers = nn.ModuleList(_Layer(width, family, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self._dropout = dropout
        for value in self.parameters():
            if value.ndim > 1:
                nn.init.normal_(value, std=0.02 if value.shape[0] == VOCAB_SIZE else 0.5 * value.shape[-1] ** -0.5)

    def forward(self, blocks: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte, with the experts' balancing loss while it trains.

        Args:
            blocks: Bytes as int64, `(batch, length)`.
        """
        state = functional.dropout(
            self.embed_tokens(blocks) + self.embed_positions.weight, self._dropout, self.training
        )
        balance = state.new_zeros(())
        for layer in self.layers:
            state, uneven = layer(state)
            balance = balance + uneven
        logits = self.norm(state)[:, :-1] @ self.embed_tokens.weight.T
        loss = functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
        return loss + _BALANCE * balance if self.training else loss


class _Layer(nn.Module):
    def __init__(self, width: int, family: str, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.forward_part = _Experts(width) if family == "moe" else _Dense(width)
        self._dropout = dropout

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = state.shape
        parts = self.attention(self.norms[0](state)).view(batch, length, 3, width // _HEAD, _HEAD)
        dropout = self._dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(
            *parts.permute(2, 0, 3, 1, 4), is_causal=True, dropout_p=dropout
        )
        state = state + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        more, uneven = self.forward_part(self.norms[1](state))
        return state + more, uneven


class _Dense(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(functional.gelu(self.up(state))), state.new_zeros(())


class _Experts(nn.Module):
    """Every expert is computed and two are kept: at this size that is faster than sending tokens about."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, _EXPERTS, bias=False)
        self.up = nn.Parameter(torch.empty(_EXPERTS, 2 * width, width))
        self.down = nn.Parameter(torch.empty(_EXPERTS, width, 2 * width))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = state.flatten(0, 1)
        shares = self.router(tokens).softmax(dim=-1)
        kept, chosen = shares.topk(_CHOSEN, dim=-1)
        weights = torch.zeros_like(shares).scatter(1, chosen, kept / kept.sum(dim=-1, keepdim=True))
        hidden = functional.gelu(tokens @ self.up.transpose(1, 2))  # (expert, token, hidden)
        mixed = ((hidden @ self.down.transpose(1, 2)) * weights.T[..., None]).sum(dim=0)
        # Switch Transformers (arXiv 2101.03961), eq. 4
        uneven = _EXPERTS * ((weights > 0).float().mean(dim=0) / _CHOSEN * shares.mean(dim=0)).sum()
        return mixed.view_as(state), uneven
