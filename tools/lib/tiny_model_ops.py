"""The parts of the network whose gradients are written out, because that halves the time of a step on a CPU."""

import torch

BLOCK = 128  # query rows per attention tile


class CausalAttention(torch.autograd.Function):
    """Causal grouped-query attention: q [B, S, H, D], k and v [B, S, K, D] -> [B, S, H*D].

    Tiles of BLOCK query rows see only the keys up to their end, and the query heads of a KV head share one product.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        batch, length, heads, width = q.shape
        kv_heads = k.shape[2]
        dims = (batch, length, heads, width, kv_heads, heads // kv_heads)
        qh = by_kv_head(q * width**-0.5, dims)
        kh = k.transpose(1, 2).reshape(batch * kv_heads, length, width)
        vh = v.transpose(1, 2).reshape(batch * kv_heads, length, width)
        out, probabilities = torch.empty_like(qh), []
        later = torch.full((BLOCK, BLOCK), -1e4, dtype=q.dtype).triu(1)
        for begin in range(0, length, BLOCK):
            end = min(begin + BLOCK, length)
            rows = end - begin
            logits = torch.bmm(flat(qh[:, :, begin:end]), kh[:, :end].transpose(1, 2)).view(-1, dims[5], rows, end)
            logits[..., begin:end] += later[:rows, :rows]
            p = torch.softmax(logits, -1)
            out[:, :, begin:end] = torch.bmm(flat(p), vh[:, :end]).view(-1, dims[5], rows, width)
            probabilities.append(p)
        ctx.save_for_backward(qh, kh, vh, *probabilities)
        ctx.dims = dims
        return by_token(out, dims)

    @staticmethod
    def backward(ctx, grad):
        qh, kh, vh, *probabilities = ctx.saved_tensors
        batch, length, heads, width, kv_heads, group = ctx.dims
        grad = by_kv_head(grad, ctx.dims)
        dq, dk, dv = torch.empty_like(qh), torch.zeros(kh.shape), torch.zeros(vh.shape)
        for p, begin in zip(probabilities, range(0, length, BLOCK)):
            end = min(begin + BLOCK, length)
            g = flat(grad[:, :, begin:end])
            dp = torch.bmm(g, vh[:, :end].transpose(1, 2)).view_as(p)
            ds = flat(torch._softmax_backward_data(dp, p, -1, p.dtype))
            dv[:, :end] += torch.bmm(flat(p).transpose(1, 2), g)
            dk[:, :end] += torch.bmm(ds.transpose(1, 2), flat(qh[:, :, begin:end]))
            dq[:, :, begin:end] = torch.bmm(ds, kh[:, :end]).view(-1, group, end - begin, width)
        to_tokens = lambda x: x.to(grad.dtype).view(batch, kv_heads, length, width).transpose(1, 2)
        return by_token(dq * width**-0.5, ctx.dims).view(batch, length, heads, width), to_tokens(dk), to_tokens(dv)


def by_kv_head(x, dims):
    """[B, S, H, D] or [B, S, H*D] -> [B*K, G, S, D]."""
    batch, length, _, width, kv_heads, group = dims
    return x.reshape(batch, length, kv_heads, group, width).permute(0, 2, 3, 1, 4).reshape(batch * kv_heads, group, length, width)


def by_token(x, dims):
    """[B*K, G, S, D] -> [B, S, H*D]."""
    batch, length, heads, width, kv_heads, group = dims
    return x.view(batch, kv_heads, group, length, width).permute(0, 3, 1, 2, 4).reshape(batch, length, heads * width)


def flat(x):
    """[N, G, rows, n] -> [N, G*rows, n]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


class RmsNorm(torch.autograd.Function):
    """fp32 in, `dtype` out."""

    @staticmethod
    def forward(ctx, x, gain, eps, dtype):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        unit = x * scale
        ctx.save_for_backward(unit, gain, scale)
        return (unit * gain).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        unit, gain, scale = ctx.saved_tensors
        grad = grad.float()
        product = grad * unit
        gain_grad = product.flatten(0, -2).sum(0)
        mean = (product.view(-1, gain.shape[0]) @ gain).view_as(scale).div_(gain.shape[0])
        x_grad = torch.addcmul(grad * gain, unit, mean, value=-1).mul_(scale)
        return x_grad, gain_grad, None, None


class Rope(torch.autograd.Function):
    """Half-split rotation of x [B, S, heads, D]; `cos` and `sin` are [S, D/2]."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def turn(x, cos, sin):
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.addcmul(a * cos, b, sin, value=-1, out=out[..., :half])
    torch.addcmul(b * cos, a, sin, out=out[..., half:])
    return out


class SwiGlu(torch.autograd.Function):
    """x [..., 2F] holds gate and up; silu(gate) * up."""

    @staticmethod
    def forward(ctx, x):
        gate, up = x.chunk(2, -1)
        ctx.save_for_backward(x)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        size = gate.shape[-1]
        out = torch.empty_like(x)
        torch.mul(grad, torch.nn.functional.silu(gate), out=out[..., size:])
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out[..., :size])
        return out
