// Quotients of the Gramians of one diagonal system: numerators from matrix products over 1 - lam_i conj(lam_j) and
// 1 - lam_i lam_j, formed without cancellation from the logarithms (compressm/kernels/gramians/reference.py has the derivation).
#include "core/torch.h"

#include <cmath>
#include <tuple>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PER_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PER_CPU
#endif

namespace {

using at::Tensor;

// What an eigenvalue contributes: modulus, 1 - modulus, and cosine and sine of half its phase.
struct Factors {
  std::vector<double> modulus, gap, cosine, sine;
};

Factors factors(const Tensor& log_decay, const Tensor& phase) {
  const int64_t n = log_decay.numel();
  const double* decay = log_decay.const_data_ptr<double>();
  const double* angle = phase.const_data_ptr<double>();
  Factors f{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n), std::vector<double>(n)};
  for (int64_t i = 0; i < n; ++i) {
    f.modulus[i] = std::exp(decay[i]);
    f.gap[i] = -std::expm1(decay[i]);
    f.cosine[i] = std::cos(angle[i] / 2);
    f.sine[i] = std::sin(angle[i] / 2);
  }
  return f;
}

// Row i of the eigenvalues exp(-decay + i angle), and all of them; the angles of a row enter with one sign or the other.
struct Row {
  double modulus, gap, cosine, sine, angle;
};
struct Columns {
  const double *modulus, *gap, *cosine, *sine, *angle;
};

// out (2n) = (re + i im) / (1 - lam_i lam_j) for one row i.  sin and cos of half the sum of two angles come from those of the
// halves, but for a small sum, where that would cancel, from the series.
PER_CPU void quotient_row(int64_t n, const double* re, const double* im, Row row, Columns all, double* out) {
  for (int64_t j = 0; j < n; ++j) {
    const double half = 0.5 * (row.angle + all.angle[j]), h2 = half * half;
    const double series =
        half * (1 - h2 / 6 * (1 - h2 / 20 * (1 - h2 / 42 * (1 - h2 / 72))));
    const double sum = row.sine * all.cosine[j] + row.cosine * all.sine[j];
    const double s = h2 < 0.015625 ? series : sum;
    const double c = row.cosine * all.cosine[j] - row.sine * all.sine[j];
    const double product = 2 * row.modulus * all.modulus[j];
    const double x = row.gap + row.modulus * all.gap[j] + product * s * s;
    const double y = -product * s * c;
    const double scale = 1 / (x * x + y * y);
    out[2 * j] = (re[j] * x + im[j] * y) * scale;
    out[2 * j + 1] = (im[j] * x - re[j] * y) * scale;
  }
}

void check_square(const Tensor& t, int64_t n, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kDouble && t.is_contiguous() && t.dim() == 2 && t.size(0) == n && t.size(1) == n, name,
              ": expected a contiguous float64 matrix of ", n, " rows and columns");
}

// rr = Re B Re B^T, ii = Im B Im B^T, ri = Re B Im B^T of B (n, H); returns (B B^H) / (1 - lam conj(lam)) and
// (B B^T) / (1 - lam lam), complex128 (n, n) each.
std::tuple<Tensor, Tensor> gramian_quotients(const Tensor& log_decay, const Tensor& phase, const Tensor& rr, const Tensor& ii,
                                             const Tensor& ri) {
  TORCH_CHECK(log_decay.scalar_type() == at::kDouble && log_decay.is_contiguous() && log_decay.dim() == 1,
              "log_decay: expected a contiguous float64 vector");
  TORCH_CHECK(phase.scalar_type() == at::kDouble && phase.is_contiguous() && phase.sizes() == log_decay.sizes(),
              "phase: expected a contiguous float64 vector like log_decay");
  const int64_t n = log_decay.numel();
  check_square(rr, n, "rr");
  check_square(ii, n, "ii");
  check_square(ri, n, "ri");
  const Factors f = factors(log_decay, phase);
  const double* angle = phase.const_data_ptr<double>();
  std::vector<double> minus_sine(n), minus_angle(n);
  for (int64_t j = 0; j < n; ++j) {
    minus_sine[j] = -f.sine[j];
    minus_angle[j] = -angle[j];
  }
  const Columns conjugate{f.modulus.data(), f.gap.data(), f.cosine.data(), minus_sine.data(), minus_angle.data()};
  const Columns same{f.modulus.data(), f.gap.data(), f.cosine.data(), f.sine.data(), angle};
  const Tensor ir = ri.t().contiguous();
  Tensor P = at::empty({n, n}, rr.options().dtype(at::kComplexDouble)), S = at::empty_like(P);
  const double* products[4] = {rr.const_data_ptr<double>(), ii.const_data_ptr<double>(), ri.const_data_ptr<double>(),
                               ir.const_data_ptr<double>()};
  double* p = reinterpret_cast<double*>(P.mutable_data_ptr<c10::complex<double>>());
  double* s = reinterpret_cast<double*>(S.mutable_data_ptr<c10::complex<double>>());
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> row(4 * n);
    double *re = row.data(), *im = re + n, *re_s = im + n, *im_s = re_s + n;
    for (int64_t i = begin; i < end; ++i) {
      const double *a = products[0] + i * n, *b = products[1] + i * n, *c = products[2] + i * n, *d = products[3] + i * n;
      for (int64_t j = 0; j < n; ++j) {
        re[j] = a[j] + b[j];
        im[j] = d[j] - c[j];
        re_s[j] = a[j] - b[j];
        im_s[j] = d[j] + c[j];
      }
      const Row own{f.modulus[i], f.gap[i], f.cosine[i], f.sine[i], angle[i]};
      quotient_row(n, re, im, own, conjugate, p + 2 * i * n);
      quotient_row(n, re_s, im_s, own, same, s + 2 * i * n);
    }
  });
  return {P, S};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(compressm_cpp, m) {
  m.def("gramian_quotients(Tensor log_decay, Tensor phase, Tensor rr, Tensor ii, Tensor ri) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(compressm_cpp, CPU, m) { m.impl("gramian_quotients", &gramian_quotients); }
