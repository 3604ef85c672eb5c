// Passes over rows that torch makes five or more of, each in one: a row is read once and stays in the cache.
//
// Arrays are row-major and contiguous. X, Y stand for float or bf16; sums run in float32. A result does not depend on
// the number of threads: a thread owns whole rows, and sums over rows go through a fixed number of partial sums.
// Compiled without fast-math and without contraction, so that rounding is that of the formulas in quant.py.

#include <cmath>
#include <cstdint>
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

// codes = round(127 v / max|v|) with v = RMSNorm(source(x)), or source(x) where weight is absent.
template <class X>
void quantize(const X *x, const float *weight, int64_t rows, int64_t size, float eps, int activation, int8_t *codes,
              float *scale, float *rms) {
    int64_t width = activation == NONE ? size : 2 * size;
#pragma omp parallel
    {
        std::vector<float> buffer(size);
        float *row = buffer.data();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; ++t) {
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
            float s = scale[t] = 127.0f / (absmax < 1e-5f ? 1e-5f : absmax);
            bool finite = largest < 0x7f800000;
            int8_t *to = codes + t * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) to[i] = int8_t(int32_t(finite ? round_half_even(row[i] * s) : 0.0f));
        }
    }
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

// The two factors of a BitLinear's backward products: by_column = grad * column, and the transpose of grad / scale.
template <class G, class Y>
void scale_gradient(const G *grad, const float *column, const float *scale, int64_t rows, int64_t size, Y *by_column,
                    Y *transposed) {
    constexpr int64_t TILE = 32;
#pragma omp parallel for schedule(static)
    for (int64_t t0 = 0; t0 < rows; t0 += TILE) {
        int64_t height = rows - t0 < TILE ? rows - t0 : TILE;
        Y tile[TILE][TILE];  // [column][row]
        for (int64_t i0 = 0; i0 < size; i0 += TILE) {
            int64_t width = size - i0 < TILE ? size - i0 : TILE;
            for (int64_t t = 0; t < height; ++t) {
                const G *from = grad + (t0 + t) * size + i0;
                Y *to = by_column + (t0 + t) * size + i0;
                float step = 1.0f / scale[t0 + t];
                for (int64_t i = 0; i < width; ++i) {
                    float value = load(from[i]);
                    store(value * column[i0 + i], to[i]);
                    store(value * step, tile[i][t]);
                }
            }
            for (int64_t i = 0; i < width; ++i)
                for (int64_t t = 0; t < height; ++t) transposed[(i0 + i) * rows + t0 + t] = tile[i][t];
        }
    }
}

// The gradient of RMSNorm(source(x)): to x, and per block of rows to the weight, `partial` (blocks, size).
template <class G, class X>
void norm_backward(const G *grad, const X *x, const float *weight, const float *rms, int64_t rows, int64_t size,
                   int activation, int64_t blocks, X *grad_x, float *partial) {
    int64_t width = activation == NONE ? size : 2 * size, height = (rows + blocks - 1) / blocks;
#pragma omp parallel
    {
        std::vector<float> buffer(size);
        float *row = buffer.data();
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
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
        }
    }
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

// sum |w| of every block of `block` weights, in float64.
void absolute_sums(const float *w, int64_t count, int64_t block, double *sums) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < count; start += block) {
        int64_t end = start + block < count ? start + block : count;
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; ++i) sum += double(std::fabs(w[i]));
        sums[start / block] = sum;
    }
}

// -1 where w < -half, 1 where w > half, else 0.
void ternary_codes(const float *w, float half, int64_t count, int8_t *codes) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; ++i) codes[i] = int8_t((w[i] > half) - (w[i] < -half));
}
}
