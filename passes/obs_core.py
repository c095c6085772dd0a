"""OBS: removing whole inputs of a weight matrix so that its outputs change least, the rest making up for them. Pure functions.

Shapes. N outputs, K inputs, U units of w inputs each, R removals, B columns in hand; letters after an underscore are
dimensions: W_nk is [N, K]. A unit is what goes as a whole: one column of down_proj (a neuron), or those columns of o_proj that
one KV group feeds.

The problem. With H the mean of x xᵀ over tokens, weights W' that are zero on the removed inputs P and free on the kept ones
cost tr(ΔHΔᵀ), Δ = W' - W. With M = H⁻¹ over the inputs that are left, the best W' and its cost have closed forms:

    score(P) = tr(W_P [M_PP]⁻¹ W_Pᵀ)          the loss that removing P adds, exactly
    W  ←  W - W_P [M_PP]⁻¹ M_P:               the others make up for it
    M  ←  M - M_:P [M_PP]⁻¹ M_P:              the inverse over what is left now

For one weight these are the saliency and the update of optimal brain surgeon (Hassibi & Stork 1993); ZipLM (arXiv 2302.04089)
gives them for structures. Since the second keeps W at its least-squares optimum, the scores of one removal after another add
up to the loss of the whole set. So the greedy order, least score first, yields every level at once, with its loss. Which set is
best is NP-hard to say; greedy finds it where inputs are uncorrelated.

The form used here. Scores need W only as G = WᵀW, and G has a recurrence of its own. With U = [M_PP]⁻¹ M_P: and
T = G_P: - ½ G_PP U, both with one row for each input of P,

    M ← M - (M_P:)ᵀ U,   G ← G - UᵀT - TᵀU,   score(P) = tr([M_PP]⁻¹ G_PP)

Removals go in batches. Inside one, only the diagonal blocks of M and G follow each step, and the rows of the unit that goes,
which cost O(BK); then both matrices are brought up to date by one product, on and above the diagonal only. The choice is that of
the plain algorithm, step by step. R of K single inputs cost 3K²R flops at most, less as matrices are closed up over what is
left, and K³ for the first inverse; N enters by WᵀW alone. `sweep` holds two K×K matrices of fp64 and strips of a third, besides
H as given; `compensate` less.

Choices.
- λ = `damp` times the mean diagonal is added to H, as in gptq_core. Losses of a sweep are those of H + λI, so they also count
  λ|Δ|²; `loss` does not. Compensation is never worse than plain deletion by either: it moves more weights than deletion does,
  so what it gains under H + λI it gains at the outputs.
- An input that was never seen is free. Its unit, if no other input of it was seen either, goes first, at no loss; a kept one
  keeps its weights.
- Scores that differ by 1e-9 of the least are equal, and the lower number goes: rounding, threads and batches do not decide.
- Weights are solved anew from H by Cholesky for the kept set at hand, not read off the sweep. In the form
  W_K + W_P H_PK (H_KK + λI)⁻¹, equal to (W(H + λI))_:K (H_KK + λI)⁻¹, nothing is rounded where nothing is removed. (The sweep
  would do: after 2000 of 2048 removals its loss was still that of the solved weights to 15 digits.)
- Drift. Where inputs carry earlier error, `gptq_core.retarget` first moves W to where it undoes that. To compensate the result
  under the H of those inputs is to solve for the wanted outputs by least squares (OSSCAR's target), drawn to W by λ.

Compensation is worth more than the choice among scores that know the inputs, and the magnitude of weights is a trap
(benchmarks/pruning.py has a model of yours by method, with and without compensation).

Alternatives not taken.
- W and M updated in full at each removal, as the formulas read: more flops, all of them in outer products, which run at the
  speed of memory.
- Many units by the same scores (SlimGPT, arXiv 2412.18110, which gets scores of groups from a Cholesky factor): an approximation
  for a speed that is not needed here. Scores that are never renewed lose little on a real model, and much on random inputs of
  low rank.
- Swaps of a kept unit for a removed one while the loss falls (local search of OSSCAR, arXiv 2403.12983). Tried: the loss falls
  by a few per cent on random inputs of low rank, and by next to nothing on a real model. Levels would no longer nest.
- Wanda (arXiv 2306.11695) by columns and FLAP (2312.11983) are here as baselines only. FLAP's own compensation, a bias, needs one
  in the model; it is what least squares gives to a constant input alone.

Limits. The loss is that of one matrix on the calibration inputs: with fewer tokens than inputs it is overfitted, of the layers
behind it knows nothing, and losses of different layers do not compare. The rows that make kept inputs are not changed. A few
huge inputs raise λ for all. Greedy never takes a removal back; the swaps say what that costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import CompressError

_BATCH = 64  # columns removed between two updates of the whole matrices
_STRIP = 128  # rows in one product or copy: of a symmetric matrix, what lies left of its strip is not computed
_SHRINK = 8  # matrices are closed up when one unit in so many is gone
_TIE = 1e-9  # scores nearer than this, relative to the least, are equal: the first goes

Pick = Callable[[Tensor, Tensor], int]  # of scores [U] and the units' numbers [U], rising: which position goes


@dataclass(frozen=True, eq=False)
class Problem:
    """A matrix W [N, K], the Hessian H [K, K] of its inputs, mean of x xᵀ, and the columns [U, w] of each of its U units.

    Every column belongs to one unit. W and H are not copied; H stands here as it was given, and `lam` is what is added to its
    diagonal. `seen_k` says which inputs are not always zero.
    """

    W_nk: Tensor
    H_kk: Tensor
    columns_uw: Tensor
    lam: float
    seen_k: Tensor

    def free(self) -> Tensor:
        """Which units no input ever reached, [U] of bool."""
        return ~self.seen_k[self.columns_uw].any(1)

    def kept(self, gone_u: Tensor) -> Tensor:
        """The units that are left without these, rising."""
        left_u = torch.ones(len(self.columns_uw), dtype=torch.bool, device=gone_u.device)
        left_u[gone_u] = False
        return left_u.nonzero().flatten()


@dataclass(frozen=True, eq=False)
class Sweep:
    """Units in the order in which they go, [R], and by how much the loss grows with each.

    Level r is `problem.kept(order_u[:r])`, and `loss_r[r]` its loss after compensation, in the metric H + λI.
    """

    order_u: Tensor
    increase_u: Tensor
    loss_r: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_r", torch.cat((self.increase_u.new_zeros(1), self.increase_u.cumsum(0))))


def prepare(W_nk: Tensor, H_kk: Tensor, columns_uw: Tensor | None = None, *, damp: float = 0.01) -> Problem:
    """The problem, with λ = `damp` times the mean diagonal of the inputs that were seen; without `columns_uw` each is a unit.

    CompressError if a number is not finite.
    """
    if columns_uw is None:
        columns_uw = torch.arange(W_nk.shape[1], device=W_nk.device)[:, None]
    assert torch.equal(columns_uw.flatten().sort().values.cpu(), torch.arange(W_nk.shape[1])), "columns belong to one unit each"
    if not bool(W_nk.sum(dtype=torch.float64).isfinite() & H_kk.sum(dtype=torch.float64).isfinite()):
        raise CompressError("the weight or the Hessian of its inputs holds NaN or infinite numbers; it cannot be pruned")
    diag_k = H_kk.diagonal()
    seen_k = diag_k > 0
    lam = damp * float(diag_k[seen_k].mean(dtype=torch.float64)) if bool(seen_k.any()) else 0.0
    return Problem(W_nk, H_kk, columns_uw, lam, seen_k)


@torch.no_grad()
def sweep(p: Problem, stop: int | None = None) -> Sweep:
    """The first `stop` units, or all, in the order in which greedy removes them. Units that nothing reached go first."""
    stop = len(p.columns_uw) if stop is None else stop
    assert 0 <= stop <= len(p.columns_uw), stop
    free_u = p.free()
    first_u = free_u.nonzero().flatten()[:stop]
    order_u, increase_u = _eliminate(p, (~free_u).nonzero().flatten(), stop - len(first_u), _least)
    return Sweep(torch.cat((first_u, order_u)), torch.cat((increase_u.new_zeros(len(first_u)), increase_u)))


@torch.no_grad()
def along(p: Problem, order_u: Tensor) -> Sweep:
    """The losses of an order that something else chose, were it compensated at every level: what `sweep` tells of its own."""
    live_u = ~p.free()
    forced = iter(order_u[live_u[order_u]].tolist())
    increase_u = torch.zeros(len(order_u), dtype=torch.float64, device=order_u.device)
    count = int(live_u[order_u].sum())
    done = _eliminate(p, live_u.nonzero().flatten(), count, lambda _, ids_u: int(torch.searchsorted(ids_u, next(forced))))
    increase_u[live_u[order_u]] = done[1]
    return Sweep(order_u, increase_u)


@torch.no_grad()
def compensate(p: Problem, kept_u: Tensor) -> Tensor:
    """The weights [N, |kept| w] that do best without the other units, in the dtype of W; their columns go as `columns[kept]`.

    Solved anew from H, as W_K + W_P H_PK (H_KK + λI)⁻¹. With everything kept they are those of W, bit for bit.
    """
    kept_k, lost_k = p.columns_uw[kept_u].flatten(), p.columns_uw[p.kept(kept_u)].flatten()
    moved_k, lost_k = p.seen_k[kept_k], lost_k[p.seen_k[lost_k]]
    W_nk = p.W_nk[:, kept_k]
    if len(lost_k) == 0 or not bool(moved_k.any()):
        return W_nk
    E_kn = _taken(p.H_kk, kept_k[moved_k], lost_k) @ p.W_nk[:, lost_k].double().T
    E_kn = torch.cholesky_solve(E_kn, _cholesky(p, kept_k[moved_k]))
    W_nk[:, moved_k] = (W_nk[:, moved_k].double() + E_kn.T).to(W_nk.dtype)
    return W_nk


@torch.no_grad()
def loss(p: Problem, kept_u: Tensor, W_nk: Tensor | None = None) -> float:
    """tr(ΔHΔᵀ), undamped, when `W_nk` stands in for the kept columns; of plain deletion without it; nothing kept: the energy."""
    kept_k = p.columns_uw[kept_u].flatten()
    D_nk = p.W_nk.to(torch.float64, copy=True)
    D_nk[:, kept_k] -= p.W_nk[:, kept_k].double() if W_nk is None else W_nk.double()
    return max(0.0, sum(float(((D_nk @ p.H_kk[:, a:b].double()) * D_nk[:, a:b]).sum()) for a, b in _strips(len(p.H_kk))))


@torch.no_grad()
def obs(p: Problem) -> Tensor:
    """Scores [U]: what the loss grows by if this unit alone is removed."""
    live_u = (~p.free()).nonzero().flatten()
    score_u = torch.zeros(len(p.columns_uw), dtype=torch.float64, device=p.W_nk.device)
    if len(live_u):
        M_kk, G_kk = _start(p, live_u)
        score_u[live_u] = _scores(*(_diagonal(A_kk, p.columns_uw.shape[1]) for A_kk in (M_kk, G_kk)))
    return score_u


def magnitude(p: Problem, producers_u: Tensor) -> Tensor:
    """Scores [U]: |W_P|² and, as the caller knows it, the squared norm [U] of the rows that make the unit's inputs."""
    return _by_unit(p, p.W_nk.double().square().sum(0)) + producers_u.double()


def wanda(p: Problem) -> Tensor:
    """Scores [U]: mean |W_ij| over outputs times the root mean square of input j, summed over the unit (Wanda-sp)."""
    return _by_unit(p, p.W_nk.double().abs().mean(0) * p.H_kk.diagonal().double().clamp(min=0).sqrt())


def flap(p: Problem, mean_k: Tensor) -> Tensor:
    """Scores [U]: variance of input j, whose mean [K] is given, times Σ_i W_ij², summed over the unit (FLAP's WIFV)."""
    variance_k = (p.H_kk.diagonal().double() - mean_k.double().square()).clamp(min=0)
    return _by_unit(p, variance_k * p.W_nk.double().square().sum(0))


def ranked(score_u: Tensor) -> Tensor:
    """Units by rising score, equal ones by their number: the order in which a score removes them."""
    return torch.argsort(score_u, stable=True)


def _by_unit(p: Problem, score_k: Tensor) -> Tensor:
    return score_k[p.columns_uw].sum(1)


def _least(score_u: Tensor, ids_u: Tensor) -> int:
    """The first of the least, by a margin that rounding does not cross."""
    return int((score_u <= score_u.min() * (1 + _TIE)).to(torch.uint8).argmax())


def _eliminate(p: Problem, ids_u: Tensor, stop: int, pick: Pick) -> tuple[Tensor, Tensor]:
    """`stop` of these units, all of them reached, as `pick` chooses them, and the increases of the loss."""
    order, increase, w = list[Tensor](), [torch.zeros(0, dtype=torch.float64, device=ids_u.device)], p.columns_uw.shape[1]
    if stop > 0:
        M_kk, G_kk = _start(p, ids_u)
        gone_u = torch.zeros_like(ids_u, dtype=torch.bool)
    while stop > 0:
        chosen_b, grown_b, (R_bk, U_bk, T_bk) = _batch(M_kk, G_kk, w, gone_u, min(stop, max(1, _BATCH // w)), pick, ids_u)
        order.append(ids_u[chosen_b])
        increase.append(grown_b)
        stop -= len(chosen_b)
        if stop > 0:
            _downdate(M_kk, R_bk, U_bk)
            _downdate(G_kk, torch.cat((U_bk, T_bk)), torch.cat((T_bk, U_bk)))
        if stop > 0 and int(gone_u.sum()) * _SHRINK >= len(gone_u):
            M_kk, G_kk = (_closed(A_kk, ~gone_u.repeat_interleave(w)) for A_kk in (M_kk, G_kk))
            ids_u, gone_u = ids_u[~gone_u], torch.zeros_like(gone_u[~gone_u])
    return torch.cat(order) if order else ids_u[:0], torch.cat(increase)


def _start(p: Problem, units_u: Tensor) -> tuple[Tensor, Tensor]:
    """(H + λI)⁻¹ and WᵀW over the columns of some units, fp64; good on and above the diagonal."""
    columns_k = p.columns_uw[units_u].flatten()
    M_kk = torch.cholesky_inverse(_cholesky(p, columns_k)).mT.contiguous()  # LAPACK leaves it by columns
    W_nk = (p.W_nk[:, columns_k] * p.seen_k[columns_k]).double()
    G_kk = torch.empty_like(M_kk)
    for a, b in _strips(len(G_kk)):
        torch.mm(W_nk[:, a:b].T, W_nk[:, a:], out=G_kk[a:b, a:])
    return M_kk, G_kk


def _batch(
    M_kk: Tensor, G_kk: Tensor, w: int, gone_u: Tensor, count: int, pick: Pick, ids_u: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Choose `count` units and mark them in `gone_u`: positions, increases, and the R = M_P:, U and T that M and G still lack.

    M and G themselves stand still. Only their diagonal blocks follow each removal, and the rows of the unit that goes.
    """
    R_bk, U_bk, T_bk = (M_kk.new_empty(count * w, len(M_kk)) for _ in range(3))
    M_uww, G_uww = _diagonal(M_kk, w), _diagonal(G_kk, w)
    chosen, grown = list[int](), list[Tensor]()
    for a in range(0, count * w, w):
        R, U, T = R_bk[a : a + w], U_bk[a : a + w], T_bk[a : a + w]
        score_u = _scores(M_uww, G_uww).masked_fill_(gone_u, torch.inf)
        u = pick(score_u, ids_u)
        at = slice(u * w, u * w + w)
        _rows(M_kk, at.start, R).addmm_(R_bk[:a, at].T, U_bk[:a], alpha=-1)
        _rows(G_kk, at.start, T).addmm_(T_bk[:a, at].T, U_bk[:a], alpha=-1).addmm_(U_bk[:a, at].T, T_bk[:a], alpha=-1)
        U.copy_(_divided(R[:, at], R))
        T.addmm_(T[:, at].clone(), U, alpha=-0.5)
        M_uww -= _blocks(R, U)
        change_uww = _blocks(U, T)
        G_uww -= change_uww + change_uww.mT
        gone_u[u] = True
        chosen.append(u)
        grown.append(score_u[u])
    return torch.tensor(chosen, device=ids_u.device), torch.stack(grown), (R_bk, U_bk, T_bk)


def _scores(M_uww: Tensor, G_uww: Tensor) -> Tensor:
    """tr([M_PP]⁻¹ G_PP) of every unit."""
    if M_uww.shape[1] == 1:
        return (G_uww / M_uww).flatten().clamp_(min=0)
    return _divided(M_uww, G_uww).diagonal(dim1=1, dim2=2).sum(1).clamp_(min=0)


def _divided(A: Tensor, B: Tensor) -> Tensor:
    """A⁻¹ B for positive definite A."""
    return B / A if A.shape[-1] == 1 else torch.cholesky_solve(B, torch.linalg.cholesky_ex(A).L)


def _rows(A_kk: Tensor, a: int, out: Tensor) -> Tensor:
    """Rows a, a + 1, ... of a symmetric matrix whose upper triangle is good, into `out`."""
    for i, row in enumerate(out, a):
        row[:i] = A_kk[:i, i]
        row[i:] = A_kk[i, i:]
    return out


def _diagonal(A_kk: Tensor, w: int) -> Tensor:
    """The blocks [U, w, w] on the diagonal of a symmetric matrix whose upper triangle is good; a copy."""
    A_uww = A_kk.view(len(A_kk) // w, w, -1, w).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return A_uww.triu() + A_uww.triu(1).mT


def _blocks(A_wk: Tensor, B_wk: Tensor) -> Tensor:
    """The blocks [U, w, w] on the diagonal of AᵀB."""
    w = len(A_wk)
    if w == 1:
        return (A_wk * B_wk).view(-1, 1, 1)
    return A_wk.view(w, -1, w).permute(1, 2, 0) @ B_wk.view(w, -1, w).permute(1, 0, 2)


def _downdate(A_kk: Tensor, X_bk: Tensor, Y_bk: Tensor) -> None:
    """A -= XᵀY, a symmetric product, on and above the diagonal."""
    for a, b in _strips(len(A_kk)):
        A_kk[a:b, a:].addmm_(X_bk[:, a:b].T, Y_bk[:, a:], alpha=-1)


def _closed(A_kk: Tensor, left_k: Tensor) -> Tensor:
    """A without some rows and columns, in the memory of A: what a row moves to was read before."""
    at_k = left_k.nonzero().flatten()
    K = len(at_k)
    closed_kk: Tensor = A_kk.view(-1)[: K * K].view(K, K)
    for a, b in _strips(K):
        closed_kk[a:b] = A_kk[at_k[a:b]][:, at_k]
    return closed_kk


def _cholesky(p: Problem, at_k: Tensor) -> Tensor:
    """The lower factor of H + λI over some inputs; those never seen, whose rows are zero, have 1 on the diagonal."""
    A_kk = _taken(p.H_kk, at_k, at_k)
    A_kk.diagonal().add_(p.lam).masked_fill_(~p.seen_k[at_k], 1.0)
    found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(A_kk)
    if int(found[1]) != 0:
        raise CompressError("the Hessian of the inputs is not positive definite; raise `damp`")
    return found[0]


def _taken(H_kk: Tensor, rows_k: Tensor, columns_k: Tensor) -> Tensor:
    """Some rows and columns of H, fp64."""
    out = torch.empty(len(rows_k), len(columns_k), dtype=torch.float64, device=H_kk.device)
    for a, b in _strips(len(rows_k)):
        out[a:b] = H_kk[rows_k[a:b]][:, columns_k]
    return out


def _strips(K: int) -> list[tuple[int, int]]:
    """Where strips begin and end."""
    return [(i, min(i + _STRIP, K)) for i in range(0, K, _STRIP)]
