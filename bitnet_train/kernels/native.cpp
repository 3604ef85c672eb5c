// Passes over rows that torch makes five or more of, each in one: a row is read once and stays in the cache.
//
// Arrays are row-major and contiguous. X, Y stand for float or bf16; sums run in float32. A result does not depend on
// the number of threads: a thread owns whole rows, and sums over rows go through a fixed number of partial sums.
// Compiled without fast-math and without contraction, so that rounding is that of the formulas in quant.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bf16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }

inline void store(float value, float &to) { to = value; }
inline void store(float value, bf16 &to) {  // round half to even; a NaN stays one
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float round_half_even(float value) {  // for |value| < 2^22
    const float shift = 12582912.0f;         // 1.5 * 2^23: its unit in the last place is 1
    return (value + shift) - shift;
}

// exp by 2^n e^f with |f| <= ln(2) / 2; within 2 units in the last place. Below -87: 0; above 88: inf. NaN stays.
inline float exp_approx(float x) {
    float bounded = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = round_half_even(bounded * 1.44269504f);
    float f = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = (p * f) * f + f + 1.0f;
    int32_t power = (int32_t(n == n ? n : 0.0f) + 127) << 23;
    float y = p * __builtin_bit_cast(float, power);
    return x < -87.0f ? 0.0f : (x > 88.0f ? INFINITY : y);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_approx(-x)); }

enum Activation { NONE = 0, RELU2 = 1, SILU = 2 };

// What is normalised: x itself, or act(gate) * up for a row that holds gate, then up.
template <class X> void source_row(const X *x, int64_t size, int activation, float *row) {
    if (activation == NONE) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) row[i] = load(x[i]);
    } else if (activation == RELU2) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float gate = load(x[i]), positive = gate < 0.0f ? 0.0f : gate;
            row[i] = (positive * positive) * load(x[size + i]);
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float gate = load(x[i]);
            row[i] = (gate * sigmoid(gate)) * load(x[size + i]);
        }
    }
}

// The gradient of source_row: `grad` of the row to `to`, in the layout of x.
template <class X> void source_backward(const X *x, const float *grad, int64_t size, int activation, X *to) {
    if (activation == NONE) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) store(grad[i], to[i]);
    } else if (activation == RELU2) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float gate = load(x[i]), positive = gate < 0.0f ? 0.0f : gate;
            store(grad[i] * load(x[size + i]) * (2.0f * positive), to[i]);
            store(grad[i] * (positive * positive), to[size + i]);
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            float gate = load(x[i]), s = sigmoid(gate);
            store(grad[i] * load(x[size + i]) * (s * (1.0f + gate * (1.0f - s))), to[i]);
            store(grad[i] * (gate * s), to[size + i]);
        }
    }
}

// work(r, buffer) for every r, the rows spread over the threads; `buffer` has room for `size` floats.
template <class Work> void for_each_row(int64_t rows, int64_t size, Work work) {
#pragma omp parallel firstprivate(work)
    {
        std::vector<float> buffer(size);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) work(r, buffer.data());
    }
}

// codes = round(127 v / max|v|) with v = RMSNorm(source(x)), or source(x) where weight is absent.
template <class X>
void quantize(const X *x, const float *weight, int64_t rows, int64_t size, float eps, int activation, int8_t *codes,
              float *scale, float *rms) {
    int64_t width = activation == NONE ? size : 2 * size;
    for_each_row(rows, size, [=](int64_t t, float *row) {
        source_row(x + t * width, size, activation, row);
        if (weight) {
            float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < size; ++i) squares += row[i] * row[i];
            float r = rms[t] = 1.0f / std::sqrt(squares / float(size) + eps);
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) row[i] = (row[i] * r) * weight[i];
        }
        int32_t largest = 0;  // bits of |v| order like |v| itself, with inf and NaN on top
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < size; ++i) {
            int32_t bits = __builtin_bit_cast(int32_t, row[i]) & 0x7fffffff;
            largest = largest > bits ? largest : bits;
        }
        float absmax = __builtin_bit_cast(float, largest);
        // As torch divides a number by a tensor: 127 times the reciprocal, both rounded.
        float s = scale[t] = 127.0f * (1.0f / (absmax < 1e-5f ? 1e-5f : absmax));
        bool finite = largest < 0x7f800000;
        int8_t *to = codes + t * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) to[i] = int8_t(int32_t(finite ? round_half_even(row[i] * s) : 0.0f));
    });
}

// y = products * column / scale + bias + residual; bias and residual may be absent.
template <class Y>
void dequantize(const int32_t *products, const float *column, const float *scale, const float *bias, const Y *residual,
                int64_t rows, int64_t size, Y *y) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; ++t) {
        const int32_t *from = products + t * size;
        Y *to = y + t * size;
        float step = 1.0f / scale[t];
        if (!bias && !residual) {
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) store(float(from[i]) * (column[i] * step), to[i]);
        } else {
            for (int64_t i = 0; i < size; ++i) {
                float value = float(from[i]) * (column[i] * step);
                if (bias) value += bias[i];
                if (residual) value += load(residual[t * size + i]);
                store(value, to[i]);
            }
        }
    }
}

// The halves of two rows of 8, element by element in turn.
#ifdef __clang__
#define LOWER(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define UPPER(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOWER(a, b) __builtin_shuffle(a, b, index{0, 8, 1, 9, 2, 10, 3, 11})
#define UPPER(a, b) __builtin_shuffle(a, b, index{4, 12, 5, 13, 6, 14, 7, 15})
#endif

// Transposes 8 x 8 elements: three rounds that interleave the upper with the lower half of the rows.
template <class T> inline void transpose8(const T *from, int64_t from_stride, T *to, int64_t to_stride) {
    typedef T vector __attribute__((vector_size(8 * sizeof(T))));  // T is an unsigned integer
    typedef vector index [[maybe_unused]];
    vector a[8], b[8];
    for (int i = 0; i < 8; ++i) std::memcpy(&a[i], from + i * from_stride, sizeof(vector));
    for (int round = 0; round < 3; ++round) {
        for (int i = 0; i < 4; ++i) b[2 * i] = LOWER(a[i], a[i + 4]), b[2 * i + 1] = UPPER(a[i], a[i + 4]);
        for (int i = 0; i < 8; ++i) a[i] = b[i];
    }
    for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &a[i], sizeof(vector));
}

inline void transpose8(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    transpose8(reinterpret_cast<const uint32_t *>(from), from_stride, reinterpret_cast<uint32_t *>(to), to_stride);
}

inline void transpose8(const bf16 *from, int64_t from_stride, bf16 *to, int64_t to_stride) {
    transpose8(&from->bits, from_stride, &to->bits, to_stride);
}

constexpr int64_t TILE_ROWS = 64, TILE_COLUMNS = 128;  // of bf16: 16 KB

// `tile`, rows of TILE_COLUMNS, to columns of `to`.
template <class Y>
void transpose_tile(const Y *tile, int64_t height, int64_t width, Y *to, int64_t stride) {
    if (height == TILE_ROWS && width == TILE_COLUMNS) {
        for (int64_t i = 0; i < TILE_COLUMNS; i += 8)
            for (int64_t t = 0; t < TILE_ROWS; t += 8)
                transpose8(tile + t * TILE_COLUMNS + i, TILE_COLUMNS, to + i * stride + t, stride);
    } else {
        for (int64_t i = 0; i < width; ++i)
            for (int64_t t = 0; t < height; ++t) to[i * stride + t] = tile[t * TILE_COLUMNS + i];
    }
}

template <class G, class Y>
void scale_row(const G *__restrict from, const float *__restrict column, float step, int64_t width,
               Y *__restrict by_column, Y *__restrict scaled) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float value = load(from[i]);
        store(value * column[i], by_column[i]);
        store(value * step, scaled[i]);
    }
}

// The two factors of a BitLinear's backward products: by_column = grad * column, and the transpose of grad / scale.
template <class G, class Y>
void scale_gradient(const G *grad, const float *column, const float *scale, int64_t rows, int64_t size, Y *by_column,
                    Y *transposed) {
#pragma omp parallel for schedule(static)
    for (int64_t t0 = 0; t0 < rows; t0 += TILE_ROWS) {
        int64_t height = std::min(rows - t0, TILE_ROWS);
        Y tile[TILE_ROWS * TILE_COLUMNS];
        for (int64_t i0 = 0; i0 < size; i0 += TILE_COLUMNS) {
            int64_t width = std::min(size - i0, TILE_COLUMNS);
            for (int64_t t = 0; t < height; ++t) {
                const G *from = grad + (t0 + t) * size + i0;
                Y *to = by_column + (t0 + t) * size + i0, *scaled = tile + t * TILE_COLUMNS;
                scale_row(from, column + i0, 1.0f / scale[t0 + t], width, to, scaled);
            }
            transpose_tile(tile, height, width, transposed + i0 * rows + t0, rows);
        }
    }
}

// The gradient of RMSNorm(source(x)): to x, and per block of rows to the weight, `partial` (blocks, size).
template <class G, class X>
void norm_backward(const G *grad, const X *x, const float *weight, const float *rms, int64_t rows, int64_t size,
                   int activation, int64_t blocks, X *grad_x, float *partial) {
    int64_t width = activation == NONE ? size : 2 * size, height = (rows + blocks - 1) / blocks;
    for_each_row(blocks, size, [=](int64_t block, float *row) {
        float *sums = partial + block * size;
        for (int64_t i = 0; i < size; ++i) sums[i] = 0.0f;
        int64_t end = (block + 1) * height < rows ? (block + 1) * height : rows;
        for (int64_t t = block * height; t < end; ++t) {
            const G *g = grad + t * size;
            float r = rms[t], mean = 0.0f;
            source_row(x + t * width, size, activation, row);
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < size; ++i) {
                float normal = row[i] * r, product = load(g[i]) * normal;
                sums[i] += product;
                mean += product * weight[i];
                row[i] = normal;
            }
            mean /= float(size);
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) row[i] = r * (load(g[i]) * weight[i] - row[i] * mean);
            source_backward(x + t * width, row, size, activation, grad_x + t * width);
        }
    });
}

// The heads of each token, `stride` elements after those before it, turned by sign times the angle of its position.
template <class X>
void rotate(const X *x, const float *cos, const float *sin, float sign, int64_t tokens, int64_t stride, int64_t heads,
            int64_t half, int64_t positions, X *y) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
        const float *c = cos + t % positions * 2 * half, *s = sin + t % positions * 2 * half;
        for (int64_t head = 0; head < heads; ++head) {
            const X *from = x + t * stride + head * 2 * half;
            X *to = y + (t * heads + head) * 2 * half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                float first = load(from[i]), second = load(from[half + i]), signed_sine = sign * s[i];
                store(first * c[i] - second * signed_sine, to[i]);
                store(second * c[i] + first * signed_sine, to[half + i]);
            }
        }
    }
}

// Where a query of a block looks. The rows of a score matrix are (head, group, query); query i of the block stands at
// position `position + i` of its row of tokens and sees the keys from starts[i] (its document's first) to itself. The
// columns are the keys from position `first` on.
struct Window {
    const int64_t *starts;
    int64_t queries, position, first;
    int64_t begin(int64_t row) const { return starts[row % queries] - first; }
    int64_t end(int64_t row) const { return position + row % queries + 1 - first; }
};

// scores <- softmax(scores * factor) over the keys that a query sees, 0 elsewhere; its log-sum-exp to lse.
template <class Y> void softmax_rows(Y *scores, int64_t rows, int64_t keys, float factor, Window window, float *lse) {
    for_each_row(rows, keys, [=](int64_t r, float *row) {
        Y *s = scores + r * keys;
        int64_t begin = window.begin(r), end = window.end(r);
        float largest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int64_t j = begin; j < end; ++j) {
            row[j] = load(s[j]) * factor;
            largest = largest > row[j] ? largest : row[j];
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t j = begin; j < end; ++j) sum += row[j] = exp_approx(row[j] - largest);
        float inverse = 1.0f / sum;
        lse[r] = largest + std::log(sum);
        for (int64_t j = 0; j < begin; ++j) store(0.0f, s[j]);
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) store(row[j] * inverse, s[j]);
        for (int64_t j = end; j < keys; ++j) store(0.0f, s[j]);
    });
}

// scores <- p = exp(scores * factor - lse), grad <- p (grad - sum of p grad) * factor; 0 where a query does not see.
template <class Y>
void softmax_backward(Y *scores, Y *grad, int64_t rows, int64_t keys, float factor, Window window, const float *lse) {
    for_each_row(rows, keys, [=](int64_t r, float *p) {
        Y *s = scores + r * keys, *g = grad + r * keys;
        int64_t begin = window.begin(r), end = window.end(r);
        float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
        for (int64_t j = begin; j < end; ++j) {
            p[j] = exp_approx(load(s[j]) * factor - lse[r]);
            delta += p[j] * load(g[j]);
        }
        for (int64_t j = 0; j < begin; ++j) store(0.0f, s[j]), store(0.0f, g[j]);
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) {
            store(p[j], s[j]);
            store(p[j] * (load(g[j]) - delta) * factor, g[j]);
        }
        for (int64_t j = end; j < keys; ++j) store(0.0f, s[j]), store(0.0f, g[j]);
    });
}

// Log-probability of each row's label under softmax(logits), and the row's log-sum-exp.
template <class Y>
void log_likelihood(const Y *logits, const int64_t *labels, int64_t rows, int64_t vocab, float *logps, float *lse) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; ++t) {
        const Y *row = logits + t * vocab;
        float largest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < vocab; ++i) largest = largest > load(row[i]) ? largest : load(row[i]);
        float shift = std::isfinite(largest) ? largest : 0.0f;  // inf - inf would be NaN
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < vocab; ++i) sum += exp_approx(load(row[i]) - shift);
        lse[t] = shift + std::log(sum);
        logps[t] = load(row[labels[t]]) - lse[t];
    }
}

// logits <- softmax(logits) * p_factor - onehot(label) * label_factor, with one factor of each kind per row.
template <class Y>
void likelihood_gradient(Y *logits, const int64_t *labels, const float *lse, const float *p_factor,
                         const float *label_factor, int64_t rows, int64_t vocab) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < rows; ++t) {
        Y *row = logits + t * vocab;
        float shift = lse[t], factor = p_factor[t];
        float label = exp_approx(load(row[labels[t]]) - shift) * factor - label_factor[t];
#pragma omp simd
        for (int64_t i = 0; i < vocab; ++i) store(exp_approx(load(row[i]) - shift) * factor, row[i]);
        store(label, row[labels[t]]);
    }
}

// sum |w| of every block of `block` weights, in float64.
template <class X> void absolute_sums(const X *w, int64_t count, int64_t block, double *sums) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < count; start += block) {
        int64_t end = std::min(start + block, count);
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; ++i) sum += double(std::fabs(load(w[i])));
        sums[start / block] = sum;
    }
}

// -1 where w < -half, 1 where w > half, else 0.
template <class X> void ternary_codes(const X *w, float half, int64_t count, int8_t *codes) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; ++i) codes[i] = int8_t((load(w[i]) > half) - (load(w[i]) < -half));
}

// The sum of x[i] w[i]. Without a pragma: compilers know this sum, and add pairs of products of 16 bits in one step.
inline int32_t dot(const int16_t *x, const int8_t *w, int64_t size) {
    int32_t sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += x[i] * int16_t(w[i]);
    return sum;
}

// a . b^T of few rows of a: (rows, size) and (out, size) to (rows, out). A row of b is read once for four of a.
void few_products(const int8_t *a, const int8_t *b, int64_t rows, int64_t out, int64_t size, int32_t *to) {
    const std::vector<int16_t> wide(a, a + rows * size);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < out; ++n) {
        const int8_t *w = b + n * size;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) {
            const int16_t *x0 = wide.data() + r * size, *x1 = x0 + size, *x2 = x1 + size, *x3 = x2 + size;
            int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int64_t i = 0; i < size; ++i) {
                const int16_t code = w[i];
                s0 += x0[i] * code, s1 += x1[i] * code, s2 += x2[i] * code, s3 += x3[i] * code;
            }
            const int32_t sums[] = {s0, s1, s2, s3};
            for (int k = 0; k < 4; ++k) to[(r + k) * out + n] = sums[k];
        }
        for (; r < rows; ++r) to[r * out + n] = dot(wide.data() + r * size, w, size);
    }
}

// Place of the two bits of the k-th of the four codes in a byte.
inline int place(int k, bool descending) { return descending ? 6 - 2 * k : 2 * k; }

constexpr int64_t PACKED = 4096;  // bytes whose codes are read or written together: they stay in the first-level cache

// to[b, i] = sum over k of (codes[b, k, i] + 1) << place(k), for codes (blocks, 4, width).
void pack_codes(const int8_t *codes, int64_t blocks, int64_t width, bool descending, uint8_t *to) {
    for (int64_t b = 0; b < blocks; ++b) {
        const int8_t *c[4];  // in the order of their places
        for (int k = 0; k < 4; ++k) c[place(k, descending) / 2] = codes + (4 * b + k) * width;
        uint8_t *row = to + b * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i)
            row[i] = uint8_t(85 + c[0][i] + 4 * (c[1][i] + 4 * (c[2][i] + 4 * c[3][i])));
    }
}

// The inverse; returns how many bytes hold a pair of bits that is 3, which is no code.
int64_t unpack_codes(const uint8_t *packed, int64_t blocks, int64_t width, bool descending, int8_t *codes) {
    int64_t bad = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t start = 0; start < width; start += PACKED) {
            const uint8_t *from = packed + b * width + start;
            int64_t count = std::min(PACKED, width - start);
            for (int k = 0; k < 4; ++k) {
                int8_t *to = codes + (4 * b + k) * width + start;
                int shift = place(k, descending);
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) to[i] = int8_t(((from[i] >> shift) & 3) - 1);
            }
#pragma omp simd reduction(+ : bad)
            for (int64_t i = 0; i < count; ++i) bad += (from[i] & (from[i] >> 1) & 0x55) != 0;
        }
    }
    return bad;
}

}  // namespace

extern "C" {

#define QUANTIZE(X, NAME)                                                                                              \
    void NAME(const X *x, const float *weight, int64_t rows, int64_t size, float eps, int activation, int8_t *codes,   \
              float *scale, float *rms) {                                                                              \
        quantize(x, weight, rows, size, eps, activation, codes, scale, rms);                                           \
    }
QUANTIZE(float, quantize_f32)
QUANTIZE(bf16, quantize_bf16)

#define DEQUANTIZE(Y, NAME)                                                                                            \
    void NAME(const int32_t *products, const float *column, const float *scale, const float *bias, const Y *residual,  \
              int64_t rows, int64_t size, Y *y) {                                                                      \
        dequantize(products, column, scale, bias, residual, rows, size, y);                                            \
    }
DEQUANTIZE(float, dequantize_f32)
DEQUANTIZE(bf16, dequantize_bf16)

#define SCALE_GRADIENT(G, Y, NAME)                                                                                     \
    void NAME(const G *grad, const float *column, const float *scale, int64_t rows, int64_t size, Y *by_column,        \
              Y *transposed) {                                                                                         \
        scale_gradient(grad, column, scale, rows, size, by_column, transposed);                                        \
    }
SCALE_GRADIENT(float, float, scale_gradient_f32_f32)
SCALE_GRADIENT(float, bf16, scale_gradient_f32_bf16)
SCALE_GRADIENT(bf16, bf16, scale_gradient_bf16_bf16)

#define NORM_BACKWARD(G, X, NAME)                                                                                      \
    void NAME(const G *grad, const X *x, const float *weight, const float *rms, int64_t rows, int64_t size,            \
              int activation, int64_t blocks, X *grad_x, float *partial) {                                             \
        norm_backward(grad, x, weight, rms, rows, size, activation, blocks, grad_x, partial);                          \
    }
NORM_BACKWARD(float, float, norm_backward_f32_f32)
NORM_BACKWARD(bf16, float, norm_backward_bf16_f32)
NORM_BACKWARD(bf16, bf16, norm_backward_bf16_bf16)

#define ROTATE(X, NAME)                                                                                                \
    void NAME(const X *x, const float *cos, const float *sin, float sign, int64_t tokens, int64_t stride,              \
              int64_t heads, int64_t half, int64_t positions, X *y) {                                                  \
        rotate(x, cos, sin, sign, tokens, stride, heads, half, positions, y);                                          \
    }
ROTATE(float, rotate_f32)
ROTATE(bf16, rotate_bf16)

#define ATTENTION(Y, SOFTMAX, BACKWARD)                                                                                \
    void SOFTMAX(Y *scores, int64_t rows, int64_t keys, float factor, const int64_t *starts, int64_t queries,          \
                 int64_t position, int64_t first, float *lse) {                                                        \
        softmax_rows(scores, rows, keys, factor, {starts, queries, position, first}, lse);                             \
    }                                                                                                                  \
    void BACKWARD(Y *scores, Y *grad, int64_t rows, int64_t keys, float factor, const int64_t *starts,                 \
                  int64_t queries, int64_t position, int64_t first, const float *lse) {                                \
        softmax_backward(scores, grad, rows, keys, factor, {starts, queries, position, first}, lse);                   \
    }
ATTENTION(float, softmax_f32, softmax_backward_f32)
ATTENTION(bf16, softmax_bf16, softmax_backward_bf16)

#define LIKELIHOOD(Y, LIKELIHOOD, GRADIENT)                                                                            \
    void LIKELIHOOD(const Y *logits, const int64_t *labels, int64_t rows, int64_t vocab, float *logps, float *lse) {   \
        log_likelihood(logits, labels, rows, vocab, logps, lse);                                                       \
    }                                                                                                                  \
    void GRADIENT(Y *logits, const int64_t *labels, const float *lse, const float *p_factor,                           \
                  const float *label_factor, int64_t rows, int64_t vocab) {                                            \
        likelihood_gradient(logits, labels, lse, p_factor, label_factor, rows, vocab);                                 \
    }
LIKELIHOOD(float, log_likelihood_f32, likelihood_gradient_f32)
LIKELIHOOD(bf16, log_likelihood_bf16, likelihood_gradient_bf16)

#define WEIGHTS(X, SUMS, CODES)                                                                                        \
    void SUMS(const X *w, int64_t count, int64_t block, double *sums) { absolute_sums(w, count, block, sums); }        \
    void CODES(const X *w, float half, int64_t count, int8_t *codes) { ternary_codes(w, half, count, codes); }
WEIGHTS(float, absolute_sums_f32, ternary_codes_f32)
WEIGHTS(bf16, absolute_sums_bf16, ternary_codes_bf16)

void integer_products(const int8_t *a, const int8_t *b, int64_t rows, int64_t out, int64_t size, int32_t *to) {
    few_products(a, b, rows, out, size, to);
}
void pack_ternary(const int8_t *codes, int64_t blocks, int64_t width, int64_t descending, uint8_t *to) {
    pack_codes(codes, blocks, width, descending, to);
}
void unpack_ternary(const uint8_t *packed, int64_t blocks, int64_t width, int64_t descending, int8_t *codes,
                    int64_t *bad) {
    *bad = unpack_codes(packed, blocks, width, descending, codes);
}
}
