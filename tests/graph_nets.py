"""Small networks for the tests of the graph: one for every way in which channels can hang together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Two branches and a shortcut, batch norms between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.outer = nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner_norm(self.inner(x)).relu())
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    """A dense block: everything before is read again; channels padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.norm, self.third = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 1)
        self.head = nn.Conv2d(15, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x).relu()
        x = torch.cat([first, self.second(first).relu()], 1)
        third = self.third(self.norm(x)) + functional.pad(first, (0, 0, 0, 0, 1, 1))
        return self.head(torch.cat([x, third], 1))


class Padded(nn.Module):
    """A shortcut padded with zeros to more channels; the amount stands in an attribute and equals a width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.extra = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1), 4
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        wide = functional.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return self.head((wide + self.second(x)).relu())


class Grouped(nn.Module):
    """Grouped and depth-wise convolutions, and one that gives two channels for each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.depth, self.twice = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 24, 1, groups=12)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.grouped(self.first(x).relu()).relu()).relu()
        return self.head(self.twice(x).relu())


class Shuffled(nn.Module):
    """Channel shuffle, pixel shuffle and unshuffle, unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.third, self.fourth, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(3, 5, 1), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)).relu()
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.fourth(functional.pixel_shuffle(self.third(x), 2)).relu()
        x = functional.pixel_unshuffle(x, 2)
        return self.head(functional.unfold(x, 1).mean(-1))


class UNet(nn.Module):
    """Down, up by a transposed convolution and by resizing, with concatenated shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.up, self.wide = nn.ConvTranspose2d(8, 5, 2, stride=2), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.norm, self.head = nn.GroupNorm(3, 6), nn.Conv2d(6 + 5 + 6 + 8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).relu()
        deep = self.deep(x).relu()
        sized = functional.interpolate(deep, scale_factor=2)
        return self.head(torch.cat([x, self.up(deep), self.norm(self.wide(deep)), sized], 1))


class Transformer(nn.Module):
    """A ViT block: class token, positions, heads in one matrix, layer scale, layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.num_heads, self.head_dim = nn.Conv2d(3, 16, 4, stride=4), 4, 3
        self.attn_dim = self.num_heads * self.head_dim
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.before, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 36), nn.Linear(12, 16)
        self.scale, self.after = nn.Parameter(torch.full((16,), 1e-5)), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def attend(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(n, tokens, self.attn_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.attend(self.before(x)) * self.scale
        x = x + self.down(functional.gelu(self.up(self.after(x))))
        return self.head(x[:, 0])


class Literal(Transformer):
    """The same with a size that no attribute holds: its heads must be refused."""

    def attend(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, 12))


class Gqa(nn.Module):
    """Fewer key heads than query heads, rotary positions, products written out."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv, self.dim = 4, 2, 6
        self.embed = nn.Embedding(11, 10)
        self.q, self.k, self.v = nn.Linear(10, 24, bias=False), nn.Linear(10, 12), nn.Linear(10, 12)
        self.out, self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in ((24, 10), (10, 7), (10, 7), (7, 10)))
        self.head = nn.Linear(10, 11, bias=False)
        self.register_buffer("angles", torch.randn(5, 3), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.cat([self.angles, self.angles], -1)
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        n, tokens, _ = x.shape
        q, k, v = (layer(x).view(n, tokens, -1, self.dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat_interleave(self.heads // self.kv, 1) for part in (k, v))
        weights = (q @ k.transpose(-1, -2) * 0.4).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + self.down(functional.silu(self.gate(x)) * self.up(x))
        return self.head(x)


class Recurrent(nn.Module):
    """Two layers of LSTM in both directions, then a GRU and a plain RNN."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.rnn, self.head = nn.GRU(10, 4, batch_first=True), nn.RNN(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(self.enter(x))
        x, _ = self.gru(x)
        return self.head(self.rnn(x)[0])


class Tied(nn.Module):
    """An embedding that is also the head, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
        return self.head(x)


class Gated(nn.Module):
    """Halves of one matrix, squeeze and excite, parts of unequal size, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [3, 5]
        self.both, self.squeeze, self.excite = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.mix, self.slope, self.one = nn.Parameter(torch.randn(5, 6)), nn.PReLU(6), nn.Conv2d(3, 3, 1)
        self.head = nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.glu(self.both(x), 1)
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        first, second = x.split(self.parts, 1)
        second = self.slope(torch.einsum("nchw,cd->ndhw", second, self.mix))
        return self.head(torch.cat([self.one(first), second], 1))


class Sliced(nn.Module):
    """A part of the channels named by numbers in the code: it must be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()[:, 1:4]).relu())


class Strange(nn.Module):
    """Operators without a rule, orders decided at run time, a softmax and a maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.inner, self.fourth, self.head = nn.Linear(3, 7), nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.special.bessel_j0(self.first(x)).cumsum(-1)
        second = self.second(first).sort(-1).values
        third = self.third(second).softmax(-1) + self.fourth(self.inner(x).relu())
        return self.head(third * third.amax(-1, keepdim=True))


class WrittenNorm(nn.Module):
    """A root mean square norm as language models write it."""

    def __init__(self, width: int, plain: bool = False) -> None:
        super().__init__()
        self.weight, self.plain = nn.Parameter(1 + 0.1 * torch.randn(width)), plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return x / (x * x).mean(-1, keepdim=True).add(1e-6).sqrt() * self.weight
        kind, x = x.dtype, x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(kind)


class Rms(nn.Module):
    """A stream with root mean square norms: written out with casts, without, and the stock one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.norms = nn.ModuleList([WrittenNorm(8), WrittenNorm(8, True), nn.RMSNorm(8), WrittenNorm(5)])
        self.up, self.down, self.mix = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 5)
        self.back = nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(functional.silu(self.up(self.norms[0](x))))
        x = x + self.back(self.norms[3](self.mix(self.norms[1](x))))
        return self.head(self.norms[2](x)).mean(1)


class Plain(nn.Sequential):
    """Convolutions with batch norms, one after the other."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(10, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
        )


class Basic(nn.Module):
    """A basic block; ReLU after the addition, in place; the first of a stage is wider and strided."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.second, self.act = nn.Conv2d(after, after, 3, padding=1), nn.ReLU(inplace=True)
        self.short = nn.Conv2d(before, after, 1, stride) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.norm(self.first(x)).relu())
        y += self.short(x)
        return self.act(y)


class Deep(nn.Sequential):
    """Two stages of three blocks."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Sequential(*(Basic(6, 6) for _ in range(3))),
            nn.Sequential(Basic(6, 8, 2), Basic(8, 8), Basic(8, 8)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )


class Layer(nn.Module):
    """A transformer layer of submodules, one of which returns more than a tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.after, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.after(x))


class Layers(nn.Sequential):
    """Transformer layers behind an embedding of patches."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), *(Layer(8) for _ in range(3)), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out.mean(1)


def image(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "residual": (Residual, image),
    "concatenated": (Concatenated, image),
    "padded": (Padded, image),
    "grouped": (Grouped, image),
    "shuffled": (Shuffled, image),
    "unet": (UNet, image),
    "transformer": (Transformer, image),
    "literal": (Literal, image),
    "gqa": (Gqa, lambda: torch.randint(11, (2, 5))),
    "recurrent": (Recurrent, lambda: torch.randn(2, 6, 3)),
    "tied": (Tied, lambda: torch.randint(9, (2, 5))),
    "gated": (Gated, image),
    "sliced": (Sliced, image),
    "rms": (Rms, lambda: torch.randn(2, 5, 3)),
    "strange": (Strange, lambda: torch.randn(2, 5, 3)),
}


def net(name: str) -> tuple[nn.Module, Tensor]:
    """One of the networks, and an input for it."""
    torch.manual_seed(0)
    make, inputs = NETS[name]
    return make().eval(), inputs()
