"""EMS in PyTorch as one would write it for a CPU or a GPU: all heads in one batch, ragged heads padded."""

import torch

NO_RANK = float("-inf")


def trailing_max(x, width):
    """The largest of the `width` entries before each one, 0 for the first."""
    padded = torch.nn.functional.pad(x, (width, 0))
    return torch.nn.functional.max_pool1d(padded[..., :-1].unsqueeze(0), width, stride=1).squeeze(0)


def window_scores(keys, queries, sinks, recent, span_weight, span_width):
    """keys [H, T, D], queries [H, G, W, D] of the last W positions -> scores [H, T]."""
    heads, rows, dim = keys.shape
    group, window = queries.shape[1:3]
    logits = torch.matmul(queries.reshape(heads, group * window, dim), keys.transpose(1, 2)) * dim**-0.5
    logits = logits.view(heads, group, window, rows)
    future = torch.ones(window, window, dtype=torch.bool).triu(1)
    logits[..., -window:].masked_fill_(future, float("-inf"))
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    local = weights.sum(dim=2).amax(dim=1)
    scores = local.clone()  # the window is all that was seen, so the global term is the local one
    inner = local[:, sinks:rows - recent]
    scores[:, sinks:rows - recent] = torch.maximum(inner, span_weight * trailing_max(inner, span_width))
    return scores


def head_budgets(scores, ranks, budget, floor_share, sinks, recent):
    """Rows of each head: its best floor_share * budget, and the best normalised scores of all heads."""
    heads, rows = scores.shape
    floor = max(int(-(-floor_share * budget // 1)), sinks + recent)
    total = scores[:, sinks:rows - recent].sum(dim=1, keepdim=True, dtype=torch.float64)
    claims = (scores / total).float()
    claims.scatter_(1, ranks.topk(floor, dim=1).indices, NO_RANK)
    best = claims.flatten().topk(heads * (budget - floor)).indices
    return floor + torch.bincount(best // rows, minlength=heads)


def compress(keys, values, queries, budget, gamma=1.0, tau=0.3, sinks=4, recent=8, floor_share=0.75, span_weight=0.35,
             span_width=5):
    """-> counts [H], positions [H, C], keys and values [H, C, D], log masses [H, C]; C is the largest count."""
    heads, rows, dim = keys.shape
    scores = window_scores(keys, queries, sinks, recent, span_weight, span_width)
    ranks = scores.clone()
    ranks[:, rows - recent:] = float("inf")
    ranks[:, :sinks] = float("inf")
    counts = head_budgets(scores, ranks, budget, floor_share, sinks, recent)

    # Tiers: kept rows come first in the order of ranks, candidates next.
    most = int(counts.max())
    room = int((gamma * counts).floor().max())
    order = ranks.topk(min(most + room, rows), dim=1).indices
    place = torch.arange(order.shape[1])
    kept_valid = place[:most] < counts[:, None]
    kept = order[:, :most].masked_fill(~kept_valid, rows).sort(dim=1).values  # ascending, padding last
    kept_valid = kept < rows
    kept = kept.clamp(max=rows - 1)
    at = (counts[:, None] + torch.arange(room)).clamp(max=order.shape[1] - 1)
    candidates = order.gather(1, at)
    candidate_valid = torch.arange(room) < (gamma * counts).floor()[:, None]

    def rows_of(x, index):
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, dim))

    # Classes.
    kept_keys, kept_values = rows_of(keys, kept), rows_of(values, kept)
    candidate_values = rows_of(values, candidates)
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)
    similarity = torch.bmm(unit(rows_of(keys, candidates)), unit(kept_keys).transpose(1, 2)).clamp_(min=0)
    similarity *= torch.bmm(unit(candidate_values), unit(kept_values).transpose(1, 2)).clamp_(min=0)
    similarity.masked_fill_((~kept_valid | (kept < sinks)).unsqueeze(1), -1.0)
    closest, centre = similarity.max(dim=2)
    merged = (closest > tau) & candidate_valid

    # Merging, weighted by score.
    weight = scores.gather(1, candidates) * merged
    own = scores.gather(1, kept)
    total = own.scatter_add(1, centre, weight)
    sums = (kept_values.float() * own.unsqueeze(-1)).scatter_add(
        1, centre.unsqueeze(-1).expand(-1, -1, dim), candidate_values.float() * weight.unsqueeze(-1))
    absorbed = torch.zeros_like(own).scatter_add(1, centre, merged.float())
    mean = (sums / total.clamp(min=1e-30).unsqueeze(-1)).to(values.dtype)
    new_values = torch.where((absorbed > 0).unsqueeze(-1), mean, kept_values)
    return counts, kept, kept_keys, new_values, torch.log1p(absorbed)
