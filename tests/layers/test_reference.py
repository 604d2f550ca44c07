"""The layers against second implementations, written from the equations alone, in float64.

The golden data fix one size (64 channels); here are other widths, kernels, rates, groups and rectangular maps, and the
options that no released code has. A reference takes the weights under our key names and computes convolution, linear
layer and BatchNorm by their definitions.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import EcaModule, SelectiveKernel, SEModule
from timm.layers.cbam import CbamModule
from timm.models.xcit import XCA
from torch import Tensor

from timm_attn import create_attn


class Weights:
    """Parameters and buffers of a module by key, with the operations that use them."""

    def __init__(self, state: dict[str, Tensor], parameters: set[str], train: bool) -> None:
        self.state = {k: v.clone().requires_grad_(k in parameters) for k, v in state.items()}
        self.after = {k: v.clone() for k, v in state.items() if k not in parameters}
        self.train = train

    def __call__(self, key: str) -> Tensor:
        return self.state[key]

    def linear(self, key: str, v: Tensor) -> Tensor:
        """W v + b for each row of v (N, C); W may be the kernel of a 1x1 convolution."""
        y = torch.einsum('oc,nc->no', self.state[f'{key}.weight'].flatten(1), v)
        bias = self.state.get(f'{key}.bias')
        return y if bias is None else y + bias

    def conv(
        self, key: str, x: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
    ) -> Tensor:
        """Cross-correlation, tap by tap."""
        w = self.state[f'{key}.weight']
        (n, c, h, wd), (o, per, kh, kw) = x.shape, w.shape
        assert c == per * groups
        padded = x.new_zeros(n, c, h + 2 * padding, wd + 2 * padding)
        padded[:, :, padding : padding + h, padding : padding + wd] = x
        rows = (h + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
        cols = (wd + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
        outputs = []
        for g in range(groups):
            part, kernel = padded[:, g * per : (g + 1) * per], w[g * o // groups : (g + 1) * o // groups]
            y = x.new_zeros(n, o // groups, rows, cols)
            for i in range(kh):
                for j in range(kw):
                    tap = part[:, :, i * dilation :, j * dilation :][:, :, ::stride, ::stride][:, :, :rows, :cols]
                    y = y + torch.einsum('oc,nchw->nohw', kernel[:, :, i, j], tap)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        bias = self.state.get(f'{key}.bias')
        return y if bias is None else y + bias[:, None, None]

    def bn(self, key: str, x: Tensor, momentum: float = 0.1) -> Tensor:
        """BatchNorm over all dimensions but 1; notes the running statistics that a train step leaves."""
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, var = self.state[f'{key}.running_mean'], self.state[f'{key}.running_var']
        if self.train:
            count = x.numel() // x.shape[1]
            batch_mean = x.mean(dims)
            batch_var = ((x - batch_mean.reshape(shape)) ** 2).mean(dims)
            unbiased = batch_var.detach() * count / (count - 1)
            self.after[f'{key}.running_mean'] = (1 - momentum) * mean + momentum * batch_mean.detach()
            self.after[f'{key}.running_var'] = (1 - momentum) * var + momentum * unbiased
            self.after[f'{key}.num_batches_tracked'] = self.state[f'{key}.num_batches_tracked'] + 1
            mean, var = batch_mean, batch_var
        normal = (x - mean.reshape(shape)) / torch.sqrt(var + 1e-5).reshape(shape)
        return normal * self.state[f'{key}.weight'].reshape(shape) + self.state[f'{key}.bias'].reshape(shape)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def pooled(x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])


def per_channel(x: Tensor, gate: Tensor) -> Tensor:
    return torch.einsum('nchw,nc->nchw', x, gate)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Output channel i takes input channel (i mod g)·(C / g) + i div g."""
    size = x.shape[1] // groups
    return torch.stack([x[:, (i % groups) * size + i // groups] for i in range(x.shape[1])], 1)


def max_and_mean(x: Tensor, dim: int) -> Tensor:
    """The two pooled planes (N, 2, A, B), the maximum first."""
    return torch.stack([x.max(dim).values, x.sum(dim) / x.shape[dim]], 1)


def se(w: Weights, x: Tensor, **args: Any) -> Tensor:
    return per_channel(x, sigmoid(w.linear('fc2', relu(w.linear('fc1', pooled(x))))))


def cbam(
    w: Weights,
    x: Tensor,
    kernel_size: int = 7,
    spatial: bool = True,
    channel: bool = True,
    order: str = 'channel-spatial',
    **args: Any,
) -> Tensor:
    def of_channels(x: Tensor) -> Tensor:
        largest = x.flatten(2).max(2).values
        z = [w.linear('fc2', relu(w.linear('fc1', v))) for v in (pooled(x), largest)]
        return sigmoid(z[0] + z[1])[:, :, None, None]

    def of_pixels(x: Tensor) -> Tensor:
        m = w.conv('conv', max_and_mean(x, 1), padding=kernel_size // 2)
        return sigmoid(w.bn('bn', m, momentum=0.01))

    if order == 'parallel':
        return x * of_channels(x) * of_pixels(x)
    gates = [g for g, used in ((of_channels, channel), (of_pixels, spatial)) if used]
    for gate in gates if order == 'channel-spatial' else reversed(gates):
        x = x * gate(x)
    return x


def bam(w: Weights, x: Tensor, dilation: int = 4, combine: str = 'mul', **args: Any) -> Tensor:
    mc = w.linear('fc2', relu(w.bn('bn1', w.linear('fc1', pooled(x)))))
    u = relu(w.bn('bn_reduce', w.conv('conv_reduce', x)))
    for i in (1, 2):
        u = relu(w.bn(f'bn_dil{i}', w.conv(f'conv_dil{i}', u, padding=dilation, dilation=dilation)))
    ms = w.conv('conv_final', u)
    if combine == 'add':
        joint = w.bn('bn_channel', mc)[:, :, None, None] + w.bn('bn_spatial', ms)
    else:
        joint = mc[:, :, None, None] * ms
    return x * (1 + sigmoid(joint))


def gam(
    w: Weights,
    x: Tensor,
    groups: int = 1,
    shuffle: str | None = 'hidden',
    channel_gate: str | None = 'sigmoid',
    channel: bool = True,
    spatial: bool = True,
    max_pool: bool = False,
    **args: Any,
) -> Tensor:
    n, c, h, wd = x.shape
    if channel:
        pixels = torch.einsum('nchw->nhwc', x).reshape(-1, c)
        a = w.linear('fc2', relu(w.linear('fc1', pixels)))
        a = sigmoid(a) if channel_gate == 'sigmoid' else a
        x = x * torch.einsum('nhwc->nchw', a.reshape(n, h, wd, c))
    if spatial:
        u = x
        if max_pool:
            padded = x.new_full((n, c, h + 2, wd + 2), -math.inf)
            padded[:, :, 1:-1, 1:-1] = x
            shifts = [padded[:, :, i : i + h, j : j + wd] for i in range(3) for j in range(3)]
            u = torch.stack(shifts).max(0).values
        u = relu(w.bn('bn1', w.conv('conv1', u, padding=3, groups=groups)))
        u = shuffled(u, groups) if shuffle == 'hidden' else u
        u = sigmoid(w.bn('bn2', w.conv('conv2', u, padding=3, groups=groups)))
        u = shuffled(u, groups) if shuffle == 'gate' else u
        x = x * u
    return x


def sk(w: Weights, x: Tensor, form: str = 'sk_resnet', stride: int = 1, dilation: int = 1, **args: Any) -> Tensor:
    groups, wide = ((1, 32), 1) if form == 'sk_resnet' else ((32, 32), 2)
    dilations = (dilation, wide * dilation)
    u = [
        relu(w.bn(f'bn{b + 1}', w.conv(f'conv{b + 1}', x, stride, dilations[b], dilations[b], groups[b])))
        for b in range(2)
    ]
    z = relu(w.bn('bn', w.linear('fc1', pooled(u[0] + u[1]))[:, :, None, None]))[:, :, 0, 0]
    logits = w.linear('fc2', z)
    e0, e1 = torch.exp(logits[:, : x.shape[1]]), torch.exp(logits[:, x.shape[1] :])
    return per_channel(u[0], e0 / (e0 + e1)) + per_channel(u[1], e1 / (e0 + e1))


def eca(w: Weights, x: Tensor, **args: Any) -> Tensor:
    v, kernel = pooled(x), w('conv.weight')[0, 0]
    k, c = len(kernel), x.shape[1]
    z = []
    for i in range(c):
        inside = [(j, i + j - k // 2) for j in range(k) if 0 <= i + j - k // 2 < c]
        z.append(sum((kernel[j] * v[:, s] for j, s in inside), torch.zeros_like(v[:, 0])))
    return per_channel(x, sigmoid(torch.stack(z, 1)))


def srm(w: Weights, x: Tensor, **args: Any) -> Tensor:
    m = x.shape[2] * x.shape[3]
    mean = pooled(x)
    square = ((x - mean[:, :, None, None]) ** 2).flatten(2).sum(2)
    std = torch.sqrt(square / max(m - 1, 1) + 1e-5)
    z = mean * w('cfc')[:, 0] + std * w('cfc')[:, 1]
    return per_channel(x, sigmoid(w.bn('bn', z)))


def gsop(w: Weights, x: Tensor, dim: int = 128, stride: int = 1, **args: Any) -> Tensor:
    t = relu(w.bn('bn_reduce', w.conv('conv_reduce', relu(x), stride=stride))).flatten(2)
    m = t.shape[2]
    # The released form: a centring matrix of M x M.
    centring = (torch.eye(m, dtype=x.dtype) - torch.ones(m, m, dtype=x.dtype) / m) / m
    s = torch.einsum('nia,ab,njb->nij', t, centring, t)
    v = w.bn('bn_row', s[:, :, :, None])[:, :, :, 0]
    kernel = w('conv_row.weight')[:, 0, :, 0].reshape(dim, 4, dim)
    e = torch.einsum('iqj,nij->niq', kernel, v).flatten(1) + w('conv_row.bias')
    return per_channel(x, sigmoid(w.linear('conv_expand', e)))


def triplet(w: Weights, x: Tensor, kernel_size: int = 7, spatial: bool = True, **args: Any) -> Tensor:
    def gated(key: str, v: Tensor) -> Tensor:
        m = w.conv(f'{key}.conv', max_and_mean(v, 1), padding=kernel_size // 2)
        return v * sigmoid(w.bn(f'{key}.bn', m, momentum=0.01))

    # The released form: each rotated branch permutes, gates, and permutes back.
    branches = [gated('cw', x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)]
    branches.append(gated('hc', x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1))
    if spatial:
        branches.append(gated('hw', x))
    return torch.stack(branches).sum(0) / len(branches)


def csa(w: Weights, x: Tensor, num_heads: int = 1, **args: Any) -> Tensor:
    n, _, h, wd = x.shape
    q, k, v = w.conv('qkv', x).flatten(2).chunk(3, 1)
    out = []
    for head in range(num_heads):
        size = q.shape[1] // num_heads
        part = slice(head * size, (head + 1) * size)
        qh, kh = (t[:, part] / torch.sqrt((t[:, part] ** 2).sum(2, keepdim=True)) for t in (q, k))
        e = torch.exp(w('temperature')[head] * torch.einsum('nim,njm->nij', qh, kh))
        out.append(torch.einsum('nij,njm->nim', e / e.sum(2, keepdim=True), v[:, part]))
    branch = w.conv('proj', torch.cat(out, 1).reshape(n, -1, h, wd))
    return x + w('gamma') * branch


FREQUENCIES = [
    (0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0),
    (5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2),
]  # fmt: skip


def fca(w: Weights, x: Tensor, dct_size: int = 7, **args: Any) -> Tensor:
    """By the cosine transform of torch's pooling, one frequency for each run of channels."""
    q, d = torch.nn.functional.adaptive_avg_pool2d(x, dct_size), dct_size
    t = torch.arange(d, dtype=x.dtype) + 0.5
    z = []
    for c in range(x.shape[1]):
        u, v = (f * (d // 7) for f in FREQUENCIES[c * 16 // x.shape[1]])
        rows, columns = (torch.cos(math.pi * f * t / d) * math.sqrt((1 if f == 0 else 2) / d) for f in (u, v))
        z.append(torch.einsum('nij,i,j->n', q[:, c], rows, columns))
    return per_channel(x, sigmoid(w.linear('fc2', relu(w.linear('fc1', torch.stack(z, 1))))))


def coord(w: Weights, x: Tensor, **args: Any) -> Tensor:
    h = x.shape[2]
    strip = torch.cat([x.sum(3) / x.shape[3], x.sum(2) / h], 2)[..., None]
    v = w.bn('bn1', w.conv('conv1', strip))
    u = v * torch.clamp(v + 3, 0, 6) / 6
    a_h, a_w = sigmoid(w.conv('conv_h', u[:, :, :h])), sigmoid(w.conv('conv_w', u[:, :, h:]))
    return torch.einsum('nchw,nch,ncw->nchw', x, a_h[..., 0], a_w[..., 0])


def gc(w: Weights, x: Tensor, pool: str = 'attn', fuse: str = 'add', **args: Any) -> Tensor:
    if pool == 'attn':
        e = torch.exp(w.conv('conv_attn', x).flatten(1))
        c = torch.einsum('np,ncp->nc', e / e.sum(1, keepdim=True), x.flatten(2))
    else:
        c = pooled(x)

    def mlp(key: str) -> Tensor:
        u = w.linear(f'{key}.fc1', c)
        u = u - u.mean(1, keepdim=True)
        u = u / torch.sqrt((u * u).mean(1, keepdim=True) + 1e-5)
        return w.linear(f'{key}.fc2', relu(u * w(f'{key}.norm.weight') + w(f'{key}.norm.bias')))

    if fuse != 'add':
        x = per_channel(x, sigmoid(mlp('mlp_scale')))
    return x if fuse == 'mul' else x + mlp('mlp_add')[:, :, None, None]


def scse(w: Weights, x: Tensor, fuse: str = 'max', **args: Any) -> Tensor:
    by_channel = per_channel(x, sigmoid(w.linear('fc2', relu(w.linear('fc1', pooled(x))))))
    by_pixel = x * sigmoid(w.conv('conv', x))
    return by_channel + by_pixel if fuse == 'add' else torch.where(by_channel > by_pixel, by_channel, by_pixel)


def gct(w: Weights, x: Tensor, mode: str = 'l2', **args: Any) -> Tensor:
    alpha, gamma, beta = (w(k).flatten() for k in ('alpha', 'gamma', 'beta'))
    if mode == 'l1':
        e = alpha * x.abs().flatten(2).sum(2)
        n = gamma / (e.abs().mean(1, keepdim=True) + 1e-5)
    else:
        e = alpha * torch.sqrt((x**2).flatten(2).sum(2) + 1e-5)
        n = gamma / torch.sqrt((e**2).mean(1, keepdim=True) + 1e-5)
    return per_channel(x, 1 + torch.tanh(e * n + beta))


def ema(w: Weights, x: Tensor, groups: int = 32, **args: Any) -> Tensor:
    out = []
    for v in x.chunk(groups, 1):
        h = v.shape[2]
        u = w.conv('conv1x1', torch.cat([v.mean(3), v.mean(2)], 2)[..., None])
        gated = v * sigmoid(u[:, :, :h]) * sigmoid(u[:, :, h:]).transpose(2, 3)
        gated = gated - gated.mean((2, 3), keepdim=True)
        normal = gated / torch.sqrt((gated**2).mean((2, 3), keepdim=True) + 1e-5)
        v1 = normal * w('gn.weight')[:, None, None] + w('gn.bias')[:, None, None]
        v2 = w.conv('conv3x3', v, padding=1)
        e1, e2 = torch.exp(pooled(v1)), torch.exp(pooled(v2))
        t = torch.einsum('nc,nchw->nhw', e1 / e1.sum(1, keepdim=True), v2)
        t = t + torch.einsum('nc,nchw->nhw', e2 / e2.sum(1, keepdim=True), v1)
        out.append(v * sigmoid(t)[:, None])
    return torch.cat(out, 1)


def sge(w: Weights, x: Tensor, groups: int = 64, **args: Any) -> Tensor:
    out = []
    for i, v in enumerate(x.chunk(groups, 1)):
        q = torch.einsum('nchw,nc->nhw', v, pooled(v))
        spread = torch.std(q, (1, 2), keepdim=True) if q[0].numel() > 1 else torch.zeros(1, 1, 1, dtype=x.dtype)
        t = (q - q.mean((1, 2), keepdim=True)) / (spread + 1e-5)
        out.append(v * sigmoid(w('weight')[0, i] * t + w('bias')[0, i])[:, None])
    return torch.cat(out, 1)


def nl(w: Weights, x: Tensor, **args: Any) -> Tensor:
    theta, phi, g = (w.conv(k, x).flatten(2) for k in ('theta', 'phi', 'g'))
    e = torch.einsum('nhq,nhk->nqk', theta, phi) / math.sqrt(theta.shape[1])
    e = torch.exp(e - e.detach().max())
    t = torch.einsum('nqk,nhk->nhq', e / e.sum(2, keepdim=True), g).reshape(*theta.shape[:2], *x.shape[2:])
    return x + w.bn('bn', w.conv('conv_out', t))


def scsa(w: Weights, x: Tensor, num_heads: int = 1, window_size: int = 7, **args: Any) -> Tensor:
    _, c, h, wd = x.shape

    def strip_gate(norm: str, strip: Tensor) -> Tensor:  # (N, C, L)
        parts = []
        for part, k in zip(strip.chunk(4, 1), (3, 5, 7, 9), strict=True):
            kernel, bias = w(f'conv{k}.weight')[:, 0], w(f'conv{k}.bias')
            padded = torch.nn.functional.pad(part, (k // 2, k // 2))
            taps = [padded[:, :, j : j + part.shape[2]] * kernel[:, j, None] for j in range(k)]
            u = torch.stack(taps).sum(0) + bias[:, None]
            u = u - u.mean((1, 2), keepdim=True)
            parts.append(u / torch.sqrt((u**2).mean((1, 2), keepdim=True) + 1e-5))
        return sigmoid(torch.cat(parts, 1) * w(f'{norm}.weight')[:, None] + w(f'{norm}.bias')[:, None])

    a_h, a_w = strip_gate('norm_h', x.sum(3) / wd), strip_gate('norm_w', x.sum(2) / h)
    x = torch.einsum('nchw,nch,ncw->nchw', x, a_h, a_w)
    kh, kw = min(window_size, h), min(window_size, wd)
    cells = [
        x[:, :, i * kh : (i + 1) * kh, j * kw : (j + 1) * kw].mean((2, 3))
        for i in range(h // kh)
        for j in range(wd // kw)
    ]
    y = torch.stack(cells, 2)  # (N, C, N')
    y = y - y.mean((1, 2), keepdim=True)
    y = y / torch.sqrt((y**2).mean((1, 2), keepdim=True) + 1e-5)
    y = y * w('norm.weight')[:, None] + w('norm.bias')[:, None]
    q, k, v = (y * w(f'{part}.weight').flatten()[:, None] for part in 'qkv')
    d, gates = c // num_heads, []
    for head in range(num_heads):
        of = slice(head * d, (head + 1) * d)
        e = torch.exp(torch.einsum('nip,njp->nij', q[:, of], k[:, of]) / math.sqrt(d))
        gates.append(torch.einsum('nij,njp->nip', e / e.sum(2, keepdim=True), v[:, of]).mean(2))
    return per_channel(x, sigmoid(torch.cat(gates, 1)))


def simam(w: Weights, x: Tensor, e_lambda: float = 1e-4, **args: Any) -> Tensor:
    d = (x - pooled(x)[:, :, None, None]) ** 2
    v = d.sum((2, 3), keepdim=True) / max(x.shape[2] * x.shape[3] - 1, 1)
    return x * sigmoid(d / (4 * (v + e_lambda)) + 0.5)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    'se': se,
    'cbam': cbam,
    'bam': bam,
    'gam': gam,
    'sk': sk,
    'eca': eca,
    'srm': srm,
    'gsop': gsop,
    'triplet': triplet,
    'csa': csa,
    'fca': fca,
    'coord': coord,
    'gc': gc,
    'scse': scse,
    'gct': gct,
    'ema': ema,
    'sge': sge,
    'nl': nl,
    'scsa': scsa,
    'simam': simam,
}

GROUPED = {'rd_ratio': 1 / 4, 'groups': 4}
CASES: list[tuple[str, int, dict[str, Any], tuple[int, int, int]]] = [
    # attention, channels, options, (N, H, W)
    ('se', 80, {}, (2, 5, 9)),
    ('se', 36, {'rd_ratio': 1 / 4}, (1, 9, 5)),
    ('se', 24, {'rd_ratio': 1}, (3, 1, 4)),
    ('se', 48, {'bias': False}, (2, 3, 8)),
    ('cbam', 80, {}, (2, 5, 9)),
    ('cbam', 40, {'rd_ratio': 1 / 8, 'kernel_size': 3}, (3, 12, 4)),
    ('cbam', 32, {'mlp_bias': False}, (2, 6, 5)),
    ('cbam', 32, {'spatial': False}, (1, 6, 5)),
    ('cbam', 12, {'channel': False, 'kernel_size': 5}, (2, 3, 10)),
    ('bam', 80, {}, (3, 5, 9)),
    ('bam', 48, {'dilation': 2, 'rd_ratio': 1 / 8}, (2, 13, 3)),
    ('bam', 48, {'combine': 'add'}, (3, 9, 6)),
    ('gam', 48, {}, (2, 5, 9)),
    ('gam', 24, {'rd_ratio': 1 / 4}, (2, 9, 4)),
    ('gam', 32, GROUPED, (2, 5, 8)),
    ('gam', 32, GROUPED | {'groups': 2}, (2, 5, 8)),
    ('gam', 32, GROUPED | {'shuffle': None}, (1, 8, 5)),
    ('gam', 32, GROUPED | {'shuffle': 'gate', 'channel_gate': None}, (2, 8, 3)),
    ('gam', 24, {'rd_ratio': 1 / 4, 'channel': False}, (2, 4, 6)),
    ('gam', 24, {'rd_ratio': 1 / 4, 'spatial': False}, (2, 4, 6)),
    ('gam', 24, {'rd_ratio': 1 / 4, 'max_pool': True}, (2, 4, 6)),
    ('sk', 32, {}, (3, 5, 7)),
    ('sk', 96, {'stride': 2}, (2, 6, 9)),
    ('sk', 64, {'form': 'sknet'}, (2, 5, 7)),
    ('sk', 64, {'form': 'sknet', 'stride': 2, 'rd_ratio': 1}, (2, 9, 4)),
    ('sk', 32, {'form': 'sknet', 'dilation': 2}, (2, 9, 7)),
    ('eca', 80, {}, (2, 5, 9)),
    ('eca', 7, {'kernel_size': 9}, (1, 3, 4)),
    ('eca', 32, {'kernel_size': 5}, (3, 1, 2)),
    ('srm', 48, {}, (3, 5, 9)),
    ('srm', 5, {}, (4, 1, 2)),
    ('gsop', 48, {'dim': 12}, (2, 5, 9)),
    ('gsop', 20, {'dim': 6, 'stride': 2}, (3, 9, 6)),
    ('triplet', 48, {}, (2, 5, 9)),
    ('triplet', 20, {'kernel_size': 3}, (3, 12, 4)),
    ('triplet', 9, {'spatial': False}, (2, 4, 11)),
    ('cbam', 32, {}, (3, 1, 1)),
    ('bam', 32, {}, (4, 1, 1)),
    ('srm', 5, {}, (4, 1, 1)),
    ('gsop', 20, {'dim': 6}, (3, 1, 1)),
    ('csa', 32, {}, (2, 1, 1)),
    ('csa', 32, {}, (2, 5, 9)),
    ('csa', 24, {'rd_ratio': 1 / 2, 'num_heads': 3}, (3, 7, 2)),
    ('cbam', 32, {'order': 'spatial-channel'}, (2, 6, 5)),
    ('cbam', 32, {'order': 'parallel', 'kernel_size': 3}, (2, 5, 8)),
    ('fca', 32, {}, (2, 7, 7)),
    ('fca', 48, {'rd_ratio': 1 / 4, 'dct_size': 7}, (2, 5, 16)),
    ('fca', 32, {'dct_size': 17}, (1, 9, 34)),
    ('fca', 16, {}, (3, 1, 1)),
    ('coord', 24, {}, (2, 5, 9)),
    ('coord', 40, {'rd_ratio': 1 / 4, 'min_width': 2}, (2, 1, 7)),
    ('coord', 1, {'min_width': 1}, (1, 1, 1)),
    ('gc', 48, {}, (2, 5, 9)),
    ('gc', 24, {'rd_ratio': 1 / 4, 'fuse': 'mul'}, (1, 4, 3)),
    ('gc', 24, {'rd_ratio': 1 / 4, 'fuse': 'both', 'pool': 'avg'}, (3, 2, 6)),
    ('gc', 32, {}, (1, 1, 1)),
    ('scse', 10, {}, (2, 5, 9)),
    ('scse', 32, {'rd_ratio': 1 / 16, 'fuse': 'add'}, (1, 4, 3)),
    ('scse', 2, {}, (1, 1, 1)),
    ('gct', 10, {}, (2, 5, 9)),
    ('gct', 7, {'mode': 'l1'}, (2, 3, 4)),
    ('gct', 1, {}, (1, 1, 1)),
    ('ema', 64, {}, (2, 5, 9)),
    ('ema', 24, {'groups': 4}, (3, 7, 2)),
    ('ema', 3, {'groups': 1}, (2, 1, 5)),
    ('ema', 32, {}, (1, 1, 1)),
    ('sge', 64, {}, (2, 5, 9)),
    ('sge', 24, {'groups': 4}, (3, 7, 2)),
    ('sge', 24, {'groups': 8}, (2, 1, 1)),
    ('nl', 10, {}, (2, 5, 3)),
    ('nl', 24, {'rd_ratio': 1 / 4}, (3, 2, 6)),
    ('nl', 1, {}, (2, 2, 2)),
    ('scsa', 16, {}, (2, 15, 30)),
    ('scsa', 24, {'num_heads': 3}, (2, 5, 3)),
    ('scsa', 8, {'window_size': 3}, (1, 10, 2)),
    ('scsa', 8, {}, (2, 1, 1)),
    ('simam', 5, {}, (2, 5, 9)),
    ('simam', 3, {'e_lambda': 0.1}, (2, 1, 2)),
    ('simam', 3, {'e_lambda': 0.1}, (2, 1, 1)),
]


def random_attn(name: str, channels: int, **args: Any) -> torch.nn.Module:
    """An attention in float64 in which no weight, bias or running statistic has a special value."""
    torch.manual_seed(channels)
    attn = create_attn(name, channels, dtype=torch.float64, **args)
    with torch.no_grad():
        for key, tensor in attn.state_dict().items():
            if key.endswith('running_var'):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(1 if 'bn' in key and key.endswith('weight') else 0, 0.5)
    return attn


def difference(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


def case_id(value: Any) -> str:
    if isinstance(value, dict):
        return ','.join(f'{k}={v:.3g}' if isinstance(v, float) else f'{k}={v}' for k, v in value.items())
    return 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize(('name', 'channels', 'args', 'size'), CASES, ids=case_id)
def test_layer_follows_its_equations(
    name: str, channels: int, args: dict[str, Any], size: tuple[int, int, int], train: bool
) -> None:
    attn = random_attn(name, channels, **args).train(train)
    n, h, w = size
    x = torch.randn(n, channels, h, w, dtype=torch.float64, requires_grad=True)
    weights = Weights(attn.state_dict(), set(dict(attn.named_parameters())), train)
    other = x.detach().clone().requires_grad_()
    want = REFERENCES[name](weights, other, **args)
    ct = torch.randn_like(want)
    (want * ct).sum().backward()
    got = attn(x)
    (got * ct).sum().backward()
    assert difference(got, want) < 1e-10
    assert difference(x.grad, other.grad) < 1e-9
    for key, parameter in attn.named_parameters():
        assert difference(parameter.grad, weights(key).grad) < 1e-9, key
    for key, buffer in attn.named_buffers():
        assert difference(buffer, weights.after[key]) < 1e-10, key


@pytest.mark.parametrize('name', REFERENCES)
def test_options_are_all_covered_by_a_case(name: str) -> None:
    from timm_attn.layers._registry import accepted_args

    used = {option for case, _, args, _ in CASES for option in args if case == name}
    assert used == set(accepted_args(name))


@pytest.mark.parametrize('name', ['cbam', 'bam', 'triplet', 'gam', 'srm', 'gsop'])
def test_reference_tells_neighbours_apart(name: str) -> None:
    """Mistakes known from other people's code move these outputs by far more than the tolerance."""
    attn = random_attn(name, 32, **({'dim': 8} if name == 'gsop' else {})).eval()
    x = torch.randn(2, 32, 5, 7, dtype=torch.float64)
    state = attn.state_dict()
    wrong = {
        'cbam': lambda: {**state, 'conv.weight': state['conv.weight'].flip(1)},  # [mean, max]
        'bam': lambda: state,  # the sum
        'triplet': lambda: {k.replace('cw', '_').replace('hc', 'cw').replace('_.', 'hc.'): v for k, v in state.items()},
        'gam': lambda: state,  # no channel sigmoid
        'srm': lambda: {**state, 'cfc': state['cfc'] * torch.tensor([1.0, math.sqrt(34 / 35)])},  # biased variance
        'gsop': lambda: {**state, 'conv_row.weight': state['conv_row.weight'].flip(2)},
    }[name]()
    if name in ('bam', 'gam'):
        args = {'bam': {'dilation': 1}, 'gam': {'channel_gate': None}}[name]
        y = REFERENCES[name](Weights(wrong, set(), False), x, **args)
    else:
        y = REFERENCES[name](Weights(wrong, set(), False), x, **({'dim': 8} if name == 'gsop' else {}))
    assert difference(attn(x), y) > 1e-4


def test_srm_keeps_unbiased_variance_and_eps_on_flat_maps() -> None:
    """Where the maps hardly vary, std = sqrt(var + 1e-5) is far from both std and the biased form."""
    attn = random_attn('srm', 16).eval()
    x = 1 + 1e-3 * torch.randn(3, 16, 2, 2, dtype=torch.float64)
    weights = Weights(attn.state_dict(), set(), False)
    assert difference(attn(x), srm(weights, x)) < 1e-12
    z = x.mean((2, 3)) * weights('cfc')[:, 0] + x.std((2, 3)) * weights('cfc')[:, 1]
    assert difference(attn(x), per_channel(x, sigmoid(weights.bn('bn', z)))) > 1e-5


def test_triplet_of_transposed_map_swaps_its_rotated_gates() -> None:
    attn = random_attn('triplet', 24, kernel_size=3).eval()
    x = torch.randn(2, 24, 5, 11, dtype=torch.float64)
    swapped = random_attn('triplet', 24, kernel_size=3).eval()
    state = {}
    for key, value in attn.state_dict().items():
        branch, rest = key.split('.', 1)
        # The (C, W) plane of x is the (C, H) plane of its transpose, which the hc gate sees as (H, C).
        turned = value.transpose(2, 3) if value.dim() == 4 else value
        state[{'cw': 'hc', 'hc': 'cw', 'hw': 'hw'}[branch] + '.' + rest] = turned
    swapped.load_state_dict(state)
    assert difference(swapped(x.transpose(2, 3)).transpose(2, 3), attn(x)) < 1e-12


@pytest.mark.parametrize(
    ('channels', 'kernel_size'),
    [(64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7), (32, 3), (16, 3)],
)
def test_eca_formula_is_the_papers(channels: int, kernel_size: int) -> None:
    """t = int((log2 C + 1) / 2), made odd: 3, 5, 5, 5 for 64..512 and 5, 5, 5, 7 for 256..2048."""
    conv = create_attn('eca', channels).get_submodule('conv')
    assert isinstance(conv, torch.nn.Conv1d)
    assert conv.kernel_size == (kernel_size,)


# Other people's implementations of the same equations, where timm has one.


def test_se_equals_timms() -> None:
    attn = random_attn('se', 128)
    theirs = SEModule(128, rd_channels=8).double()
    theirs.load_state_dict(attn.state_dict())
    x = torch.randn(2, 128, 5, 9, dtype=torch.float64)
    assert difference(attn(x), theirs(x)) < 1e-12


def test_eca_equals_timms() -> None:
    attn = random_attn('eca', 128)
    theirs = EcaModule(128).double()
    theirs.load_state_dict(attn.state_dict())
    x = torch.randn(2, 128, 5, 9, dtype=torch.float64)
    assert difference(attn(x), theirs(x)) < 1e-12


def test_cbam_equals_timms_with_the_pooled_planes_swapped() -> None:
    """timm stacks [mean, max] and has no biases in its MLP."""
    attn = random_attn('cbam', 128, mlp_bias=False).eval()
    theirs = CbamModule(128, rd_channels=8).double().eval()
    ours = attn.state_dict()
    state = {'channel.fc1.weight': ours['fc1.weight'][:, :, None, None]}
    state['channel.fc2.weight'] = ours['fc2.weight'][:, :, None, None]
    state['spatial.conv.conv.weight'] = ours['conv.weight'].flip(1)
    state |= {f'spatial.conv.{k}': v for k, v in ours.items() if k.startswith('bn.')}
    theirs.load_state_dict(state)
    x = torch.randn(2, 128, 5, 9, dtype=torch.float64)
    assert difference(attn(x), theirs(x)) < 1e-12


def test_sknet_equals_timms() -> None:
    attn = random_attn('sk', 128, form='sknet', stride=2).eval()
    theirs = SelectiveKernel(128, 128, stride=2, groups=32, rd_channels=32, split_input=False).double().eval()
    ours = attn.state_dict()
    state = {'attn.fc_reduce.weight': ours['fc1.weight'], 'attn.fc_select.weight': ours['fc2.weight']}
    for key, value in ours.items():
        first, rest = key.split('.', 1)
        if first[:-1] in ('conv', 'bn') and first[-1:].isdigit():
            state[f'paths.{int(first[-1]) - 1}.{first[:-1]}.{rest}'] = value
        elif first == 'bn':
            state[f'attn.bn.{rest}'] = value
    theirs.load_state_dict(state)
    x = torch.randn(2, 128, 5, 9, dtype=torch.float64)
    assert difference(attn(x), theirs(x)) < 1e-12


def test_csa_branch_equals_timms_xca() -> None:
    attn = random_attn('csa', 32, rd_ratio=1, num_heads=4)
    theirs = XCA(32, num_heads=4).double()
    ours = attn.state_dict()
    state = {'qkv.weight': ours['qkv.weight'].flatten(1), 'temperature': ours['temperature']}
    state |= {'proj.weight': ours['proj.weight'].flatten(1), 'proj.bias': ours['proj.bias']}
    theirs.load_state_dict(state)
    x = torch.randn(2, 32, 5, 9, dtype=torch.float64)
    tokens = theirs(x.flatten(2).transpose(1, 2))  # (N, M, C)
    assert difference(attn(x), x + ours['gamma'] * tokens.transpose(1, 2).reshape(x.shape)) < 1e-12
