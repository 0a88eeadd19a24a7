"""HDiT with shifted windows, written as the reference implementation writes it, to be compared with ours.

The mathematics is that of Crowson et al. 2024, arXiv 2401.11605, and of `HDiTModel` with attention_types of
"shifted_window" and "global", whose weights this network takes. Written the reference's way, eagerly: norms by hand in
float32; one projection for queries, keys and values; the angles of every block computed in that block, their cosines and
sines for queries and for keys; rotations in place through an autograd function; every block rolled, cut into windows and
masked (the masks are kept), and attention on six-dimensional tensors.

Shapes: B batch, h×w tokens, D width, n heads, d head dim, s window side, R and C rows and columns of windows.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_hdit import HDiTModel
from diffusers_hdit.models.modeling_hdit import (
    HDiTShiftedWindowAttnProcessor,
    axial_positions,
    axial_rotary_frequencies,
)
from diffusers_hdit.ops.rms_norm import NORM_EPS


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean_square = torch.mean(x.to(wide) ** 2, dim=-1, keepdim=True)
    factor = scale.to(wide) * torch.rsqrt(mean_square + NORM_EPS)
    return x * factor.to(x.dtype)


def to_cosine_similarity(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both to the length sqrt(scale) of their head; `scale` broadcasts over `(B, n, h, w, 1)`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    root = torch.sqrt(scale.to(wide))
    of_q = root * torch.rsqrt(torch.sum(q.to(wide) ** 2, dim=-1, keepdim=True) + NORM_EPS)
    of_k = root * torch.rsqrt(torch.sum(k.to(wide) ** 2, dim=-1, keepdim=True) + NORM_EPS)
    return q * of_q.to(q.dtype), k * of_k.to(k.dtype)


def rotate_(x: Tensor, theta: Tensor, sign: float) -> None:
    """Turns the first features of x, in place, by the angles `theta` times the sign."""
    count = theta.shape[-1]
    first, second = x[..., :count], x[..., count : 2 * count]
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b, cos, sin = first.to(wide), second.to(wide), torch.cos(theta), sign * torch.sin(theta)
    turned = a * cos - b * sin, b * cos + a * sin
    first.copy_(turned[0])
    second.copy_(turned[1])


class RotateInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(theta)
        rotate_(x, theta, 1.0)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (theta,) = ctx.saved_tensors
        rotate_(gradient, theta, -1.0)
        return gradient, None


def to_windows(x: Tensor, size: int, shift: int) -> Tensor:
    """`(B, n, h, w, d) -> (B, n, R, C, s·s, d)`, rolled by `shift` rows and columns before it is cut."""
    x = torch.roll(x, (shift, shift), dims=(2, 3))
    x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(*x.shape[:4], size * size, x.shape[-1])


def from_windows(x: Tensor, size: int, shift: int) -> Tensor:
    x = x.unflatten(4, (size, size)).permute(0, 1, 2, 4, 3, 5, 6)
    x = x.flatten(4, 5).flatten(2, 3)
    return torch.roll(x, (-shift, -shift), dims=(2, 3))


@lru_cache
def window_mask(rows: int, columns: int, size: int, shift: int, device: torch.device) -> Tensor:
    """`(R, C, s·s, s·s)`: in the first row and column of windows, what the roll brought together stays apart."""
    row, column, y, x = torch.meshgrid(
        *(torch.arange(length, device=device) for length in (rows, columns, size, size)), indexing="ij"
    )
    wrapped = 2 * ((row == 0) & (y < shift)).int() + ((column == 0) & (x < shift)).int()
    wrapped = wrapped.flatten(2)
    return wrapped[..., :, None] == wrapped[..., None, :]


class ReferenceBlock(nn.Module):
    """One of our blocks, its weights in the reference's arrangement."""

    def __init__(self, block: nn.Module):
        super().__init__()
        attn, ff, self.head_dim = block.attn, block.ff, block.attn.head_dim
        shifted = isinstance(attn.processor, HDiTShiftedWindowAttnProcessor)
        self.window = (attn.processor.window_size, attn.processor.shift) if shifted else None
        weights = {
            "norm1": block.norm1.linear.weight,
            "qkv": torch.cat((attn.to_q.weight, attn.to_k.weight, attn.to_v.weight)),
            "scale": attn.scale,
            "out": attn.to_out[0].weight,
            "norm2": block.norm2.linear.weight,
            "up": ff.up_proj.weight,
            "down": ff.down_proj.weight,
        }
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight.detach().clone()))
        frequencies = axial_rotary_frequencies(len(attn.scale), self.head_dim, attn.scale.device)
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor, position: Tensor, cond: Tensor) -> Tensor:
        x = x + self.attend(rms_norm(x, F.linear(cond, self.norm1)[:, None, None] + 1), position)
        hidden = rms_norm(x, F.linear(cond, self.norm2)[:, None, None] + 1)
        value, gate = F.linear(hidden, self.up).chunk(2, dim=-1)
        return x + F.linear(value * F.gelu(gate), self.down)

    def attend(self, x: Tensor, position: Tensor) -> Tensor:
        qkv = F.linear(x, self.qkv).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # (B, n, h, w, d) each
        q, k = to_cosine_similarity(q, k, self.scale[:, None, None, None])
        angles = [position[..., axis, None, None] * self.frequencies for axis in (0, 1)]
        theta = torch.cat(angles, dim=-1).movedim(2, 0)  # (n, h, w, d/4)
        q, k = RotateInPlace.apply(q, theta), RotateInPlace.apply(k, theta)
        if self.window is None:
            shape = q.shape
            q, k, v = (tensor.flatten(2, 3) for tensor in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0).reshape(shape)
        else:
            q, k, v = (to_windows(tensor, *self.window) for tensor in (q, k, v))
            mask = window_mask(*q.shape[2:4], *self.window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
            out = from_windows(out, *self.window)
        return F.linear(out.permute(0, 2, 3, 1, 4).flatten(3), self.out)


class ReferenceNetwork(nn.Module):
    """
    The network of an `HDiTModel` with shifted windows (or global attention) on all levels, with a copy of its weights.

    Called like the model. What is outside of the blocks is the model's own.
    """

    def __init__(self, model: HDiTModel):
        super().__init__()
        types = {level.type for level in model.levels}
        if not types <= {"shifted_window", "global"}:
            raise ValueError(f"the levels must be of type 'shifted_window' or 'global', got {sorted(types)}.")

        def copies(blocks: nn.ModuleList) -> nn.ModuleList:
            return nn.ModuleList([ReferenceBlock(block) for block in blocks])

        self.patch_in, self.conditioning, self.merges = model.patch_in, model.conditioning, model.merges
        self.splits, self.patch_out, self.norm_out = model.splits, model.patch_out, model.norm_out.weight
        self.down = nn.ModuleList([copies(blocks) for blocks in model.down_blocks])
        self.middle = copies(model.transformer_blocks)
        self.up = nn.ModuleList([copies(blocks) for blocks in model.up_blocks])

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = False):
        x = self.patch_in(sample.permute(0, 2, 3, 1))
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(len(sample))
        cond = self.conditioning(timestep, class_labels, None, None, self.norm_out.dtype)
        axes = axial_positions(*x.shape[1:3], x.device)
        position = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        skips = []
        for blocks, merge in zip(self.down, self.merges, strict=True):
            for block in blocks:
                x = block(x, position, cond)
            skips.append((x, position))
            x = merge(x)
            position = position.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).mean((1, 3))
        for block in self.middle:
            x = block(x, position, cond)
        for blocks, split in reversed(list(zip(self.up, self.splits, strict=True))):
            skip, position = skips.pop()
            x = split(x, skip)
            for block in blocks:
                x = block(x, position, cond)
        return (self.patch_out(rms_norm(x, self.norm_out)).permute(0, 3, 1, 2).contiguous(),)
