"""Balanced truncation of diagonal systems, back to diagonal form, with guards (Moore 1981; Laub et al. 1987)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressm.control.coordinates import Coordinates, check_convention, slots, white_gramians
from compressm.control.factors import factor, power_of_two, singular_values
from compressm.control.obs import obs_subset
from compressm.control.system import DiagonalSystem, check_single
from compressm.errors import NumericalError, bad_argument, check_integer

NUMERICAL_RANK = 1e-13  # singular values below this share of the largest cannot be balanced
MAX_CONDITION = 1e4  # of the eigenvectors of the reduced A
MAX_MODULUS = 1 - 1e-6
RETRIES = 3
EXACT_ORDER = 128  # up to here every order is tried; eigenvalues of larger matrices cost too much
PROBES = 8  # decompositions in search of an order above that


@dataclass(frozen=True, eq=False)
class Reduction:
    """A reduced system and how its states sit in the full one.

    Attributes:
        system: of ``order == rank``.
        right: (n, rank) complex128; the full state is sum_j multiplicity_j Re(right_j z_j) in the real convention (n = 2N,
            coordinates [Re x; Im x]), right @ z in the complex one (n = N).
        left: (rank, n) complex128; z = left @ x.  left @ right is the identity but for modes that only fill the rank up,
            whose column of ``right`` and of C is zero.
        multiplicity: (rank,) float64, 2 for a mode that stands for a conjugate pair, else 1.
        method: ``"balanced"``, ``"balanced, data-free Q"``, ``"obs"`` or ``"identity"``.
        condition: of the eigenvectors of the reduced A; 1 where nothing was diagonalised.
        max_modulus: largest |lambda| before it was clamped.
        real_order: how many states of the convention's spectrum were kept.
    """

    system: DiagonalSystem
    right: Tensor
    left: Tensor
    multiplicity: Tensor
    method: str
    condition: float
    max_modulus: float
    real_order: int

    @property
    def order(self) -> int:
        """Complex states of the reduced system."""
        return self.system.order

    def kept(self, order: int) -> Tensor:
        """(rank,) int64 ascending: which of the ``order`` old states take most part in the kept ones.

        The part of a state is its diagonal entry, or the sum of its two, in the projector onto the kept subspace.
        """
        part = (self.multiplicity * (self.right * self.left.T).real).sum(1)
        if len(part) == 2 * order:
            part = part[:order] + part[order:]
        return part.argsort(descending=True, stable=True)[: self.order].sort().values

    @property
    def output_error(self) -> None:
        """Not known: balanced truncation looks at Gramians, not at outputs."""
        return None


@dataclass(frozen=True, eq=False)
class _Bases:
    """Square-root balancing: hsv descending, T = right[:, :m] and W^H = left[:m] for every order m up to ``rank``."""

    hsv: Tensor
    right: Tensor
    left: Tensor
    rank: int


@dataclass(frozen=True, eq=False)
class _Eigen:
    """Eigenvalues and eigenvectors of a truncated A."""

    values: Tensor
    vectors: Tensor
    modes: int  # complex states that they take


@dataclass(frozen=True, eq=False)
class Balanced:
    """A balanced system, ready to be cut at any rank.

    Attributes:
        system: the full system, unbatched.
        convention: ``"real"`` or ``"complex"``.
        P, Q: the Gramians that were balanced, (n, n).
        fallback_Q: the data-free Q where Q is measured, else None; with it every truncation is stable.
    """

    system: DiagonalSystem
    convention: str
    P: Tensor
    Q: Tensor
    fallback_Q: Tensor | None = None
    _bases: _Bases = field(init=False, repr=False)
    _coordinates: Coordinates = field(init=False, repr=False)
    _known: dict[int, _Eigen] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        # Not cached properties: in Python 3.11 all instances share their lock, and layers are balanced side by side.
        object.__setattr__(self, "_bases", _balance(self.P, self.Q))
        object.__setattr__(self, "_coordinates", Coordinates.of(self.system, self.convention))

    @property
    def hsv(self) -> Tensor:
        """(n,) float64 Hankel singular values, descending."""
        return self._bases.hsv

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """left (k, n) and right (n, k) of the k states that can be balanced: z = left @ x, x = right @ z, left @ right = 1."""
        return self._bases.left, self._bases.right

    def reduce(self, rank: int) -> Reduction:
        """Truncate to ``rank`` complex states and diagonalise.

        In the real convention the largest real order is kept whose conjugate pairs and real modes fit into ``rank``.  Where
        the cut is unstable or nearly defective, smaller orders are tried, then the data-free Q, then a subset of the
        system's own modes with C refitted.

        Raises:
            ArgumentError: rank is not between 1 and the order.
        """
        check_integer("rank", rank, 1, self.system.order)
        if rank == self.system.order:
            return self._identity()
        reduction = self._cut(self._bases, rank, "balanced")
        if reduction is None and self.fallback_Q is not None:
            reduction = self._cut(_balance(self.P, self.fallback_Q), rank, "balanced, data-free Q")
        return self._subset(rank) if reduction is None else reduction

    def _identity(self) -> Reduction:
        coordinates = self._coordinates
        left = coordinates.mode_rows(torch.arange(self.system.order, device=self.P.device))
        multiplicity = _multiplicity(self.system.order, self.convention, self.P)
        right = left.mH / multiplicity
        slowest = float(self.system.log_lam.real.max().exp())
        return Reduction(self.system, right, left, multiplicity, "identity", 1.0, slowest, coordinates.size)

    def modes(self, order: int) -> int:
        """Complex states that the leading ``order`` states of the spectrum take: one for every conjugate pair of the
        eigenvalues that they have on their own, and one for every real eigenvalue; never more than the system has."""
        least = min(self.system.order, slots(order, self.convention))
        if self.convention == "complex" or least == self.system.order or self._bases.rank == 0:
            return least
        modes = self._eigen(self._bases, min(order, self._bases.rank)).modes
        return min(self.system.order, max(least, modes))

    def _eigen(self, bases: _Bases, order: int) -> _Eigen:
        """Eigenvalues and eigenvectors of the leading ``order`` states; those of the measured Gramians are remembered."""
        known = self._known if bases is self._bases else {}
        if order not in known:
            A = bases.left[:order] @ self._coordinates.A @ bases.right[:, :order]
            values, vectors = torch.linalg.eig(A)
            modes = int((values.imag >= 0).sum()) if self.convention == "real" else order
            known[order] = _Eigen(values, vectors, modes)
        return known[order]

    def _fitting(self, bases: _Bases, rank: int) -> int:
        """The largest order whose modes fit into ``rank``, or where trying all costs too much one that (nearly) fills it."""
        top = min(bases.rank, 2 * rank if self.convention == "real" else rank)
        if top <= EXACT_ORDER or self.convention == "complex":
            return next((order for order in range(top, 0, -1) if self._eigen(bases, order).modes <= rank), 0)
        low, low_modes = rank, slots(rank, self.convention)  # every order takes at most as many modes
        for order, eigen in (self._known if bases is self._bases else {}).items():
            if low < order <= top and eigen.modes <= rank:
                low, low_modes = order, eigen.modes
        high, probe = top + 1, top
        for _ in range(PROBES):
            if low_modes == rank or high - low <= 1:
                break
            modes = self._eigen(bases, probe).modes
            if modes <= rank:
                low, low_modes = probe, modes
            else:
                high, high_modes = probe, modes
            if high <= top:
                probe = low + (rank - low_modes) * (high - low) // (high_modes - low_modes)
                probe = min(max(probe, low + 1), high - 1)
        return low

    def _cut(self, bases: _Bases, rank: int, method: str) -> Reduction | None:
        """The largest order that fits and passes the guards, or None after three that do not pass."""
        order = self._fitting(bases, rank)
        failures = 0
        while order > 0 and failures < RETRIES:
            T, W = bases.right[:, :order], bases.left[:order]
            eigen = self._eigen(bases, order)
            if eigen.modes > rank:
                order -= 1
                continue
            eigenvalues, E = eigen.values, eigen.vectors
            diagonalise = _real_modes if self.convention == "real" else _complex_modes
            lam, right, left, condition = diagonalise(eigenvalues, E, T, W)
            modulus = float(eigenvalues.abs().max())
            if modulus < 1 and condition <= MAX_CONDITION:
                return self._assemble(lam, right, left, rank, method, condition, modulus, order)
            order, failures = order - 1, failures + 1
        if bases.rank == 0:
            empty = torch.empty(0, dtype=torch.complex128, device=self.P.device)
            shape = self._coordinates.size
            return self._assemble(empty, empty.expand(shape, 0), empty[:, None].expand(0, shape), rank, method, 1.0, 0.0, 0)
        return None

    def _assemble(
        self,
        lam: Tensor,
        right: Tensor,
        left: Tensor,
        rank: int,
        method: str,
        condition: float,
        modulus: float,
        order: int,
    ) -> Reduction:
        """The diagonal system in a basis, filled up to ``rank`` with modes of the full system that have C = 0."""
        coordinates = self._coordinates
        multiplicity = torch.ones(len(lam), dtype=torch.float64, device=lam.device)
        if self.convention == "real":
            multiplicity[lam.imag > 0] = 2.0
        slowest = max(MAX_MODULUS, float(self.system.log_lam.real.max().exp()))
        log_lam = torch.complex(lam.abs().clamp(1e-300, slowest).log(), lam.angle())
        B = left @ coordinates.B.to(left)
        C = multiplicity * (coordinates.C.to(right) @ right)
        missing = rank - len(lam)
        if missing > 0:
            spare = self._strongest_modes(missing)
            rows = coordinates.mode_rows(spare)
            log_lam = torch.cat([log_lam, self.system.log_lam[spare]])
            B = torch.cat([B, self.system.B[spare]])
            C = torch.cat([C, C.new_zeros(C.shape[0], missing)], 1)
            left, right = torch.cat([left, rows]), torch.cat([right, right.new_zeros(right.shape[0], missing)], 1)
            multiplicity = torch.cat([multiplicity, _multiplicity(missing, self.convention, multiplicity)])
        system = DiagonalSystem(log_lam, B, C)
        return Reduction(system, right.contiguous(), left.contiguous(), multiplicity, method, condition, modulus, order)

    def _strongest_modes(self, count: int) -> Tensor:
        """Modes of the full system in descending order of how much the input excites them."""
        energy = self.P.diagonal().real
        if self.convention == "real":
            energy = energy[: self.system.order] + energy[self.system.order :]
        return torch.sort(energy, descending=True, stable=True).indices[:count]

    def _subset(self, rank: int) -> Reduction:
        coordinates = self._coordinates
        modes, embedding = obs_subset(coordinates, self.P, rank)
        left = coordinates.mode_rows(modes)
        multiplicity = _multiplicity(rank, self.convention, self.P)
        right = embedding.to(torch.complex128)
        if self.convention == "real":
            right = (embedding[:, :rank] - 1j * embedding[:, rank:]) / 2
        C = multiplicity * (coordinates.C.to(right) @ right)
        system = DiagonalSystem(self.system.log_lam[modes], self.system.B[modes], C)
        slowest = float(system.log_lam.real.max().exp())
        kept = embedding.shape[1]
        return Reduction(system, right, left, multiplicity, "obs", 1.0, slowest, kept)


def balance(
    system: DiagonalSystem,
    convention: str = "real",
    P: Tensor | None = None,
    Q: Tensor | None = None,
    fallback_Q: Tensor | None = None,
) -> Balanced:
    """Balance an unbatched system.

    Args:
        system: the system.
        convention: ``"real"``: the real 2N-state system behind y = Re(C x); ``"complex"``: the N complex states.
        P, Q: (n, n) Gramians in the convention's coordinates, for example measured on data; None: the data-free ones.
        fallback_Q: the data-free Q, tried where a measured Q gives no stable truncation.

    Raises:
        ArgumentError: unknown convention, a batched system, or Gramians of another shape.
        NumericalError: Gramians that are not finite.
    """
    return Balanced(system, convention, *_checked(system, convention, P, Q, fallback_Q))


def hankel_singular_values(system: DiagonalSystem, convention: str) -> Tensor:
    """(n,) float64, descending, of an unbatched system; cheaper than balancing it."""
    P, Q, _ = _checked(system, convention, None, None, None)
    return singular_values(P, Q)


def _checked(
    system: DiagonalSystem, convention: str, P: Tensor | None, Q: Tensor | None, fallback_Q: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The Gramians to balance, see :func:`balance`."""
    check_convention(convention)
    check_single(system)
    n = system.order * (2 if convention == "real" else 1)
    if P is None or Q is None:
        white_P, white_Q = white_gramians(system, convention)
        P, Q = white_P if P is None else P, white_Q if Q is None else Q
    dtype = torch.float64 if convention == "real" else torch.complex128

    def prepared(name: str, gramian: Tensor) -> Tensor:
        if gramian.shape != (n, n):
            raise bad_argument(name, got=tuple(gramian.shape), expected=f"({n}, {n}) in the {convention} convention")
        gramian = gramian.to(system.log_lam.device, dtype)
        if not bool(torch.isfinite(gramian).all()):
            raise NumericalError(f"Gramian {name} holds NaN or infinite entries, expected finite ones")
        return gramian

    return prepared("P", P), prepared("Q", Q), None if fallback_Q is None else prepared("fallback_Q", fallback_Q)


def balancing_bases(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """T and W, each (n, m): W^H T = 1, and W^H P W = T^H Q T = diag of the m Hankel singular values that are not zero."""
    bases = _balance(P, Q)
    return bases.right, bases.left.mH


def _complex_modes(eigenvalues: Tensor, E: Tensor, T: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Eigenvalues, right and left bases of all modes, and the condition of their eigenvectors."""
    condition = _condition(E)
    left = torch.linalg.solve(E, W) if condition <= MAX_CONDITION else W
    return eigenvalues, T @ E, left, condition


def _real_modes(eigenvalues: Tensor, E: Tensor, T: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """The same for one mode of every conjugate pair and the real modes of a real matrix, in real arithmetic.

    Eigenvectors e, conj(e) of a pair and sqrt(2) Re e, sqrt(2) Im e differ by a unitary matrix, hence have one condition.
    """
    pair, single = eigenvalues.imag > 0, eigenvalues.imag == 0
    lam = torch.cat([eigenvalues[pair], eigenvalues[single]])
    e, pairs = E[:, pair], int(pair.sum())
    root = math.sqrt(2)
    R = torch.cat([root * e.real, root * e.imag, E[:, single].real], 1)
    condition = _condition(R)
    left, right = torch.linalg.solve(R, W) if condition <= MAX_CONDITION else W, T @ R
    split = (pairs, pairs, len(lam) - pairs)
    (re, im, one), (t_re, t_im, t_one) = left.split(split), right.split(split, 1)
    left = torch.cat([torch.complex(re, -im) / root, one.to(E)])
    right = torch.cat([torch.complex(t_re, t_im) / root, t_one.to(E)], 1)
    return lam, right, left, condition


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values[0] / values[-1]) if bool(values[-1] > 0) else math.inf


def _balance(P: Tensor, Q: Tensor) -> _Bases:
    # Powers of two around the square root of the traces keep products of extreme Gramians inside the floating-point range.
    L_p, L_q = factor(P), factor(Q)
    unit_p, unit_q = (power_of_two(L) for L in (L_p, L_q))
    L_p, L_q = L_p / unit_p, L_q / unit_q
    U, sigma, Vh = torch.linalg.svd(L_q.mH @ L_p, full_matrices=False)
    hsv = torch.zeros(P.shape[0], dtype=torch.float64, device=P.device)
    hsv[: len(sigma)] = sigma * (unit_p * unit_q)
    rank = int((sigma > NUMERICAL_RANK * sigma[0]).sum()) if len(sigma) and bool(sigma[0] > 0) else 0
    root = sigma[:rank].sqrt()
    ratio = math.sqrt(unit_p / unit_q)
    right = (L_p @ Vh[:rank].mH / root) * ratio
    left = ((U[:, :rank] / root).mH @ L_q.mH) / ratio
    return _Bases(hsv, right, left, rank)


def _multiplicity(count: int, convention: str, like: Tensor) -> Tensor:
    value = 2.0 if convention == "real" else 1.0
    return torch.full((count,), value, dtype=torch.float64, device=like.device)
