"""What the operators compute, by their documentation; arguments outside of it raise.

Legend: B batch, N query heads, G key/value heads, S query length, K key length, D channels of a head, T rows together.
"""

import torch
import torch.nn.functional as F

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = FLOATS[1:]
COMPRESSED = 2048
MOST_VARIABLE_SEQUENCES, MOST_VARIABLE_POSITIONS = 1024, 2**20
UNLIMITED = 2147483647
LEFT_UP, RIGHT_DOWN, BAND = 2, 3, 4


def want(condition, text):
    if not condition:
        raise ValueError(text)


def same_types(*tensors, among=FLOATS):
    want(len({tensor.dtype for tensor in tensors}) == 1, f"types differ: {[tensor.dtype for tensor in tensors]}")
    want(tensors[0].dtype in among, f"{tensors[0].dtype} is not supported")


def fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
    pre_tockens=UNLIMITED, next_tockens=UNLIMITED, inner_precise=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, softmax_layout="",
):  # fmt: skip
    """softmax(mask(scale Q K^T)) V, True = hidden; seven results."""
    same_types(query, key, value)
    want(pse is None and padding_mask is None and prefix is None, "pse, padding_mask, prefix: not stood in for")
    want(key.shape == value.shape, "key and value differ in shape")
    want(0 < keep_prob <= 1, "keep_prob is in (0, 1]")
    band = (sparse_mode, pre_tockens, next_tockens)
    options = (scale, keep_prob)
    if input_layout == "TND":
        output = _variable_length(
            query, key, value, head_num, atten_mask, actual_seq_qlen, actual_seq_kvlen, band, options
        )
        return _seven(output, query)
    want(actual_seq_qlen is None and actual_seq_kvlen is None, "lengths belong to the layout TND")
    q, k, v = (_to_bnsd(x, input_layout, head_num, query) for x in (query, key, value))
    want(q.shape[1] == head_num, f"head_num {head_num} is not the query's {q.shape[1]}")
    hidden = _dense_mask(atten_mask, q, k, band)
    output = _attend(q, k, v, hidden, *options)
    return _seven(_from_bnsd(output, input_layout), query)


def _seven(output, query):
    empty = query.new_empty(0, dtype=torch.float32)
    return output, empty, empty, query.new_empty(0), 0, 0, 0


def _to_bnsd(x, layout, heads, query):
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2)
    size = query.shape[-1] // heads
    if layout == "BSH":
        return x.unflatten(-1, (-1, size)).transpose(1, 2)
    if layout == "SBH":
        return x.unflatten(-1, (-1, size)).permute(1, 2, 0, 3)
    raise ValueError(f"input_layout {layout!r} is not known")


def _from_bnsd(x, layout):
    if layout == "BNSD":
        return x
    if layout == "BSND":
        return x.transpose(1, 2)
    return x.transpose(1, 2).flatten(2) if layout == "BSH" else x.permute(2, 0, 1, 3).flatten(2)


def _dense_mask(mask, q, k, band):
    """bool, broadcast over [B, N, S, K], or None; without a mask the sparse mode does nothing."""
    if mask is None:
        return None
    want(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}, expected bool or uint8")
    batch, heads, rows, keys = *q.shape[:3], k.shape[2]
    mode = band[0]
    if mode in (0, 1):
        shapes = [(batch, heads, rows, keys), (batch, 1, rows, keys), (1, 1, rows, keys), (rows, keys)]
        want(tuple(mask.shape) in shapes, f"atten_mask {tuple(mask.shape)}, expected one of {shapes}")
        want(band[1:] == (UNLIMITED, UNLIMITED), "pre_tockens and next_tockens must fit the mask")
        return mask.bool()
    return _compressed_mask(mask, rows, keys, band)


def _compressed_mask(mask, rows, keys, band):
    """What a mode makes of the compressed mask, [rows, keys]."""
    mode, before, behind = band
    triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
    right = mask.shape == triangle.shape and (mask.is_meta or torch.equal(mask.bool(), triangle))
    want(right, "expected the compressed [2048, 2048] mask")
    want(mode in (LEFT_UP, RIGHT_DOWN, BAND), f"sparse_mode {mode}: not stood in for")
    distance = torch.arange(keys, device=mask.device)[None] - torch.arange(rows, device=mask.device)[:, None]
    if mode == LEFT_UP:
        return distance > 0
    distance = distance - (keys - rows)
    if mode == RIGHT_DOWN:
        return distance > 0
    want(before + behind >= 0, "the band is empty")
    return (distance > behind) | (distance < -before)


def _variable_length(query, key, value, heads, mask, query_ends, key_ends, band, options):
    want(query_ends is not None and key_ends is not None, "TND wants actual_seq_qlen and actual_seq_kvlen")
    want(len(query_ends) == len(key_ends) <= MOST_VARIABLE_SEQUENCES, "TND takes 1024 sequences")
    want(max(query.shape[0], key.shape[0]) <= MOST_VARIABLE_POSITIONS, "TND takes 2**20 positions")
    want(query_ends[-1] == query.shape[0] and key_ends[-1] == key.shape[0], "the last end is not T")
    want(query.shape[1] == heads, f"head_num {heads} is not the query's {query.shape[1]}")
    want(mask is None or band[0] != 0 or mask.dim() == 2, "TND takes masks of two dimensions")
    outputs, first, first_key = [], 0, 0
    for end, key_end in zip(query_ends, key_ends, strict=True):
        want(end >= first and key_end >= first_key, "ends are cumulative")
        q = query[first:end].transpose(0, 1)[None]
        k, v = (x[first_key:key_end].transpose(0, 1)[None] for x in (key, value))
        hidden = _dense_mask(mask, q, k, band)
        want(hidden is None or hidden.is_meta or not hidden.all(-1).any(), "a row of the mask hides everything")
        outputs.append(_attend(q, k, v, hidden, *options)[0].transpose(0, 1))
        first, first_key = end, key_end
    return torch.cat(outputs)


def _attend(q, k, v, hidden, scale, keep):
    want(
        q.shape[1] % k.shape[1] == 0 and q.shape[1] <= 256, "query heads are a multiple of key/value heads, at most 256"
    )
    want(q.shape[3] == k.shape[3] <= 768, "channels of a head: equal, at most 768")
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    scores = q.float() @ k.float().transpose(2, 3) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
    return F.dropout(scores.softmax(-1), 1 - keep).to(v.dtype) @ v


def fused_infer_attention_score(query, key, value, *, atten_mask=None, num_heads=1, scale=1.0, input_layout="BSH",
                                num_key_value_heads=0, sparse_mode=0, **others):  # fmt: skip
    """Attention for inference; results: attention and an empty log-sum."""
    defaults = {"pre_tokens": UNLIMITED, "next_tokens": UNLIMITED}
    want(
        all(value in (None, 0, False, defaults.get(name)) for name, value in others.items()),
        f"not stood in for: {others}",
    )
    same_types(query, key, value, among=HALVES)
    want(input_layout == "BNSD" and sparse_mode == 0, "only BNSD in mode 0 is stood in for")
    want(not torch.is_grad_enabled(), "it has no backward pass")
    want(query.shape[1] == num_heads and key.shape[1] == (num_key_value_heads or num_heads), "numbers of heads")
    if atten_mask is not None:
        want(atten_mask.dtype == torch.bool, f"atten_mask is {atten_mask.dtype}")
        shapes = [(query.shape[0], 1, query.shape[2], key.shape[2])]
        want(tuple(atten_mask.shape) in shapes, f"atten_mask {tuple(atten_mask.shape)}, expected one of {shapes}")
    return _attend(query, key, value, atten_mask, scale, 1.0), query.new_empty(0, dtype=torch.float32)


def rms_norm(input, gamma, epsilon=1e-06):
    """(y, 1 / sqrt(mean(x^2) + eps))."""
    same_types(input, gamma)
    rstd = (input.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


def add_rms_norm(x1, x2, gamma, epsilon=1e-06):
    """(y, 1 / sqrt(mean(x^2) + eps), x) of the sum x."""
    same_types(x1, x2, gamma)
    want(x1.shape == x2.shape, "x1 and x2 differ in shape")
    total = x1 + x2
    return *rms_norm(total, gamma, epsilon), total


def rms_norm_backward(dy, input, gamma, rstd):
    """(gradient of the input, gradient of gamma in float32)."""
    same_types(dy, input, gamma)
    want(dy.shape == input.shape and rstd.dtype == torch.float32, "dy like the input, rstd in float32")
    x, inner = input.float(), dy.float() * gamma.float()
    slope = -(inner * x).sum(-1, keepdim=True) * rstd**3 / x.shape[-1]
    return (inner * rstd + x * slope).to(input.dtype), (dy.float() * (x * rstd)).flatten(0, -2).sum(0)


def swiglu(input, dim=-1):
    """silu(first half) * second half."""
    same_types(input)
    first, second = input.chunk(2, dim)
    return F.silu(first) * second


def rotary_mul(input, r1, r2, rotary_mode="half"):
    """r1 x + r2 (-second half | first half)."""
    same_types(input, r1, r2)
    want(rotary_mode == "half", "only half is stood in for")
    want(input.dim() == r1.dim() == r2.dim() == 4 and r1.shape == r2.shape, "four dimensions, r1 like r2")
    size = input.shape[-1]
    want(size < 896 and size % 2 == 0 and r1.shape[-1] == size, "D is even and below 896")
    want(max(input.shape[1:3]) < 1000, "B and N are below 1000")
    want(all(own in (1, whole) for own, whole in zip(r1.shape, input.shape, strict=True)), "r1 does not broadcast")
    first, second = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-second, first), -1)


def apply_adam_w_out(beta1_power, beta2_power, lr, weight_decay, beta1, beta2, epsilon, grad, max_grad_norm, amsgrad,
                     maximize, *, out):  # fmt: skip
    """In place on (parameter, m, v); the powers are those before this step."""
    parameter, m, v = out
    want(not amsgrad and max_grad_norm is None, "amsgrad: not stood in for")
    same_types(parameter, m, v, grad)
    grad = -grad if maximize else grad
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    parameter.mul_(1 - lr * weight_decay)
    root = (v / (1 - beta2_power * beta2)).sqrt() + epsilon
    parameter.addcdiv_(m, root, value=-lr / (1 - beta1_power * beta1))
    return parameter, m, v


OPERATORS = {
    "npu_fusion_attention": fusion_attention,
    "npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_add_rms_norm": add_rms_norm,
    "npu_swiglu": swiglu,
    "npu_rotary_mul": rotary_mul,
    "npu_apply_adam_w.out": apply_adam_w_out,
}
"""By the names of their schemas."""
