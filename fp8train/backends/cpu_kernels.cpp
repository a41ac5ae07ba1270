// CPU quantisers and decoder: the codes and scales of quant/reference.py, bit for bit.
//
// Plain C interface, loaded with ctypes by backends/cpu_library.py. Built with -ffp-contract=off and without any fast-math flag:
// every operation below is one IEEE operation, so that the result does not depend on how the compiler vectorises it.
// x is [rows, cols], bf16 or fp32, unit stride along cols, `stride` elements between rows. Codes are K-major and dense.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t TILE = 128;                 // a tile is TILE x TILE; also the largest block that the square quantiser takes
constexpr int64_t PARALLEL_ELEMENTS = 1 << 14;  // below this a second thread costs more than it saves
constexpr uint32_t INF_BITS = 0x7F800000u;
constexpr uint32_t MAGNITUDE = 0x7FFFFFFFu;
constexpr uint8_t NAN_CODE = 0x7F;

struct E4M3 { static constexpr int MANTISSA = 3, BIAS = 7; static constexpr uint32_t MAX_CODE = 0x7E; static constexpr float MAX = 448.0f; };
struct E5M2 { static constexpr int MANTISSA = 2, BIAS = 15; static constexpr uint32_t MAX_CODE = 0x7B; static constexpr float MAX = 57344.0f; };

inline uint32_t bits_of(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
inline float float_of(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline float load(const float* x) { return *x; }
inline float load(const uint16_t* x) { return float_of(static_cast<uint32_t>(*x) << 16); }
constexpr float power_of_two(int exponent) {
  float value = 1.0f;
  for (; exponent > 0; --exponent) value *= 2.0f;
  for (; exponent < 0; ++exponent) value *= 0.5f;
  return value;
}

// Round to nearest, ties to even, saturating. `value` is finite: blocks with a NaN or an Inf never get here.
template <class F> inline uint8_t encode(float value) {
  constexpr int SHIFT = 23 - F::MANTISSA;
  constexpr uint32_t MIN_NORMAL = static_cast<uint32_t>(127 + 1 - F::BIAS) << 23;
  constexpr float MAGIC = power_of_two(23 + 1 - F::BIAS - F::MANTISSA);  // its ulp is the smallest subnormal
  const uint32_t bits = bits_of(value), magnitude = bits & MAGNITUDE;
  const uint32_t normal = ((magnitude + ((1u << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1u)) >> SHIFT) -
                          (static_cast<uint32_t>(127 - F::BIAS) << F::MANTISSA);
  const uint32_t subnormal = bits_of(float_of(magnitude) + MAGIC) - bits_of(MAGIC);
  const uint32_t code = std::min(magnitude < MIN_NORMAL ? subnormal : normal, F::MAX_CODE);
  return static_cast<uint8_t>(code | ((bits >> 24) & 0x80u));
}

template <class F> inline float decode(uint8_t code) {
  const uint32_t magnitude = code & 0x7Fu, sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const float normal = float_of((magnitude << (23 - F::MANTISSA)) + (static_cast<uint32_t>(127 - F::BIAS) << 23));
  const float subnormal = static_cast<float>(magnitude) * power_of_two(1 - F::BIAS - F::MANTISSA);
  float value = magnitude < (1u << F::MANTISSA) ? subnormal : normal;
  const float special = (F::MANTISSA == 2 && magnitude == 0x7Cu) ? std::numeric_limits<float>::infinity()
                                                                  : std::numeric_limits<float>::quiet_NaN();
  value = magnitude > F::MAX_CODE ? special : value;
  return float_of(bits_of(value) | sign);
}

template <class F> inline float scale_inv_of(uint32_t amax, bool pow2) {
  if (amax == 0) return 1.0f;
  if (amax >= INF_BITS) return std::numeric_limits<float>::quiet_NaN();
  float scale = float_of(amax) / F::MAX;
  if (pow2) scale = float_of((bits_of(scale) + 0x7FFFFFu) & INF_BITS);
  return std::max(scale, power_of_two(-126));
}

template <class F> inline void encode_run(const float* x, int64_t count, float scale_inv, uint8_t* q) {
  if (std::isnan(scale_inv)) { std::memset(q, NAN_CODE, count); return; }
  const float encode_scale = 1.0f / scale_inv;
  for (int64_t i = 0; i < count; ++i) q[i] = encode<F>(x[i] * encode_scale);
}

inline uint32_t amax_run(const float* x, int64_t count) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < count; ++i) amax = std::max(amax, bits_of(x[i]) & MAGNITUDE);
  return amax;
}

template <class T> inline void load_run(const T* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = load(x + i);
}

// One stage of an 8x8 byte transpose held in eight 64-bit rows: exchange STEP x STEP sub-blocks across the diagonal.
template <int STEP> inline void exchange(uint64_t (&v)[8], uint64_t mask) {
#pragma GCC unroll 4
  for (int base = 0; base < 8; base += 2 * STEP)
#pragma GCC unroll 4
    for (int i = base; i < base + STEP; ++i) {
      const uint64_t swap = ((v[i] >> (8 * STEP)) ^ v[i + STEP]) & mask;
      v[i] ^= swap << (8 * STEP);
      v[i + STEP] ^= swap;
    }
}

// bytes [rows, cols] with leading dimension TILE -> out [cols, rows] with leading dimension `stride`. Eight output rows at a time:
// `stride` is often a power of two, and more rows than that would evict each other from the first-level cache.
void transpose_tile(const uint8_t* in, int64_t rows, int64_t cols, uint8_t* out, int64_t stride) {
  const int64_t full_rows = rows - rows % 8, full_cols = cols - cols % 8;
  for (int64_t c = 0; c < full_cols; c += 8)
    for (int64_t r = 0; r < full_rows; r += 8) {
      uint64_t v[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&v[i], in + (r + i) * TILE + c, 8);
      exchange<4>(v, 0x00000000FFFFFFFFull);
      exchange<2>(v, 0x0000FFFF0000FFFFull);
      exchange<1>(v, 0x00FF00FF00FF00FFull);
      for (int i = 0; i < 8; ++i) std::memcpy(out + (c + i) * stride + r, &v[i], 8);
    }
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = c < full_cols ? full_rows : 0; r < rows; ++r) out[c * stride + r] = in[r * TILE + c];
}

// One column block [rows, cols <= TILE] at x: scales of its columns, and their codes transposed into q [cols, rows].
template <class F, class T>
void quantize_columns(const T* x, int64_t rows, int64_t cols, int64_t stride, bool pow2, uint8_t* q, int64_t q_stride, float* scale, int64_t scale_stride) {
  uint32_t amax[TILE] = {};
  float encode_scale[TILE];
  alignas(64) uint8_t codes[TILE * TILE];
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) amax[c] = std::max(amax[c], bits_of(load(x + r * stride + c)) & MAGNITUDE);
  bool finite = true;
  for (int64_t c = 0; c < cols; ++c) {
    const float scale_inv = scale_inv_of<F>(amax[c], pow2);
    scale[c * scale_stride] = scale_inv;
    finite = finite && !std::isnan(scale_inv);
    encode_scale[c] = std::isnan(scale_inv) ? 0.0f : 1.0f / scale_inv;
  }
  for (int64_t start = 0; start < rows; start += TILE) {
    const int64_t count = std::min(TILE, rows - start);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < cols; ++c) codes[r * TILE + c] = encode<F>(load(x + (start + r) * stride + c) * encode_scale[c]);
    transpose_tile(codes, count, cols, q + start, q_stride);
  }
  if (finite) return;
  for (int64_t c = 0; c < cols; ++c)
    if (amax[c] >= INF_BITS) std::memset(q + c * q_stride, NAN_CODE, rows);
}

template <class F, class T> inline void quantize_row_block(const T* x, int64_t count, bool pow2, float* buffer, uint8_t* q, float* scale) {
  uint32_t amax = 0;
  for (int64_t start = 0; start < count; start += TILE) {
    const int64_t part = std::min(TILE, count - start);
    load_run(x + start, part, buffer);
    amax = std::max(amax, amax_run(buffer, part));
  }
  *scale = scale_inv_of<F>(amax, pow2);
  if (count <= TILE) { encode_run<F>(buffer, count, *scale, q); return; }
  for (int64_t start = 0; start < count; start += TILE) {
    const int64_t part = std::min(TILE, count - start);
    load_run(x + start, part, buffer);
    encode_run<F>(buffer, part, *scale, q + start);
  }
}

struct Matrix { int64_t rows, cols, stride; int threads; };

template <class F, class T> void rows_impl(const T* x, Matrix m, int64_t block, bool pow2, uint8_t* q, float* scale) {
  const int64_t blocks = (m.cols + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(m.threads) if (m.rows * m.cols > PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < m.rows; ++r) {
    alignas(64) float buffer[TILE];
    for (int64_t b = 0; b < blocks; ++b)
      quantize_row_block<F>(x + r * m.stride + b * block, std::min(block, m.cols - b * block), pow2, buffer, q + r * m.cols + b * block, scale + r * blocks + b);
  }
}

template <class F, class T> void columns_impl(const T* x, Matrix m, int64_t block, bool pow2, uint8_t* q, float* scale) {
  const int64_t blocks = (m.rows + block - 1) / block, tiles = (m.cols + TILE - 1) / TILE;
#pragma omp parallel for collapse(2) schedule(static) num_threads(m.threads) if (m.rows * m.cols > PARALLEL_ELEMENTS)
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = b * block, col = t * TILE;
      quantize_columns<F>(x + row * m.stride + col, std::min(block, m.rows - row), std::min(TILE, m.cols - col), m.stride, pow2,
                          q + col * m.rows + row, m.rows, scale + col * blocks + b, blocks);
    }
}

// Row copy in 1 x TILE blocks and transposed column copy in TILE x 1 blocks, tile by tile: x is read from memory once.
template <class F, class T>
void dual_impl(const T* x, Matrix m, bool row_pow2, bool col_pow2, uint8_t* q, float* scale, uint8_t* qt, float* scale_t) {
  const int64_t row_tiles = (m.rows + TILE - 1) / TILE, col_tiles = (m.cols + TILE - 1) / TILE;
#pragma omp parallel for collapse(2) schedule(static) num_threads(m.threads) if (m.rows * m.cols > PARALLEL_ELEMENTS)
  for (int64_t rt = 0; rt < row_tiles; ++rt)
    for (int64_t ct = 0; ct < col_tiles; ++ct) {
      alignas(64) float tile[TILE * TILE];
      const int64_t row = rt * TILE, col = ct * TILE, rows = std::min(TILE, m.rows - row), cols = std::min(TILE, m.cols - col);
      for (int64_t r = 0; r < rows; ++r) {
        float* run = tile + r * TILE;
        load_run(x + (row + r) * m.stride + col, cols, run);
        const float scale_inv = scale_inv_of<F>(amax_run(run, cols), row_pow2);
        scale[(row + r) * col_tiles + ct] = scale_inv;
        encode_run<F>(run, cols, scale_inv, q + (row + r) * m.cols + col);
      }
      quantize_columns<F>(tile, rows, cols, TILE, col_pow2, qt + col * m.rows + row, m.rows, scale_t + col * row_tiles + rt, row_tiles);
    }
}

// Square blocks of side `block` <= TILE: codes, and their byte transpose with transposed scales unless qt is null.
template <class F, class T>
void square_impl(const T* x, Matrix m, int64_t block, bool pow2, uint8_t* q, float* scale, uint8_t* qt, float* scale_t) {
  const int64_t row_blocks = (m.rows + block - 1) / block, col_blocks = (m.cols + block - 1) / block;
#pragma omp parallel for collapse(2) schedule(static) num_threads(m.threads) if (m.rows * m.cols > PARALLEL_ELEMENTS)
  for (int64_t rb = 0; rb < row_blocks; ++rb)
    for (int64_t cb = 0; cb < col_blocks; ++cb) {
      alignas(64) float tile[TILE * TILE];
      alignas(64) uint8_t codes[TILE * TILE];
      const int64_t row = rb * block, col = cb * block, rows = std::min(block, m.rows - row), cols = std::min(block, m.cols - col);
      uint32_t amax = 0;
      for (int64_t r = 0; r < rows; ++r) {
        load_run(x + (row + r) * m.stride + col, cols, tile + r * TILE);
        amax = std::max(amax, amax_run(tile + r * TILE, cols));
      }
      const float scale_inv = scale_inv_of<F>(amax, pow2);
      scale[rb * col_blocks + cb] = scale_inv;
      for (int64_t r = 0; r < rows; ++r) {
        encode_run<F>(tile + r * TILE, cols, scale_inv, codes + r * TILE);
        std::memcpy(q + (row + r) * m.cols + col, codes + r * TILE, cols);
      }
      if (qt == nullptr) continue;
      scale_t[cb * row_blocks + rb] = scale_inv;
      transpose_tile(codes, rows, cols, qt + col * m.rows + row, m.rows);
    }
}

inline void store(float value, float* out) { *out = value; }
inline void store(float value, uint16_t* out) {  // to nearest even; a NaN stays one, since the quiet NaN of decode() has no low bits
  const uint32_t bits = bits_of(value);
  *out = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

template <class F, class T>
void decode_impl(const uint8_t* q, const float* scale, int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols, T* out, int threads) {
  const int64_t blocks = (cols + block_cols - 1) / block_cols;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * cols > PARALLEL_ELEMENTS)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t b = 0; b < blocks; ++b) {
      const float scale_inv = scale == nullptr ? 1.0f : scale[(r / block_rows) * blocks + b];
      const int64_t start = r * cols + b * block_cols, count = std::min(block_cols, cols - b * block_cols);
      for (int64_t i = 0; i < count; ++i) store(decode<F>(q[start + i]) * scale_inv, out + start + i);
    }
}

template <class Body> void dispatch(int e5m2, int bf16, const void* x, Body body) {
  if (e5m2) { if (bf16) body(E5M2{}, static_cast<const uint16_t*>(x)); else body(E5M2{}, static_cast<const float*>(x)); }
  else { if (bf16) body(E4M3{}, static_cast<const uint16_t*>(x)); else body(E4M3{}, static_cast<const float*>(x)); }
}

}  // namespace

extern "C" {

void fp8_quantize_rows(const void* x, int bf16, int64_t rows, int64_t cols, int64_t stride, int64_t block, int e5m2, int pow2, uint8_t* q, float* scale, int threads) {
  dispatch(e5m2, bf16, x, [&](auto format, auto* data) { rows_impl<decltype(format)>(data, Matrix{rows, cols, stride, threads}, block, pow2, q, scale); });
}

void fp8_quantize_columns(const void* x, int bf16, int64_t rows, int64_t cols, int64_t stride, int64_t block, int e5m2, int pow2, uint8_t* q, float* scale, int threads) {
  dispatch(e5m2, bf16, x, [&](auto format, auto* data) { columns_impl<decltype(format)>(data, Matrix{rows, cols, stride, threads}, block, pow2, q, scale); });
}

void fp8_quantize_dual(const void* x, int bf16, int64_t rows, int64_t cols, int64_t stride, int e5m2, int row_pow2, int col_pow2, uint8_t* q, float* scale, uint8_t* qt, float* scale_t, int threads) {
  dispatch(e5m2, bf16, x, [&](auto format, auto* data) { dual_impl<decltype(format)>(data, Matrix{rows, cols, stride, threads}, row_pow2, col_pow2, q, scale, qt, scale_t); });
}

void fp8_quantize_square(const void* x, int bf16, int64_t rows, int64_t cols, int64_t stride, int64_t block, int e5m2, int pow2, uint8_t* q, float* scale, uint8_t* qt, float* scale_t, int threads) {
  dispatch(e5m2, bf16, x, [&](auto format, auto* data) { square_impl<decltype(format)>(data, Matrix{rows, cols, stride, threads}, block, pow2, q, scale, qt, scale_t); });
}

// scale may be null: codes alone. Output fp32, or bf16 rounded to nearest even.
void fp8_decode(const uint8_t* q, const float* scale, int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols, int e5m2, int bf16, void* out, int threads) {
  const auto run = [&](auto format) {
    using F = decltype(format);
    if (bf16) decode_impl<F>(q, scale, rows, cols, block_rows, block_cols, static_cast<uint16_t*>(out), threads);
    else decode_impl<F>(q, scale, rows, cols, block_rows, block_cols, static_cast<float*>(out), threads);
  };
  if (e5m2) run(E5M2{}); else run(E4M3{});
}

}  // extern "C"
