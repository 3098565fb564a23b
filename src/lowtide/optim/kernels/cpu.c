// One pass over a bfloat16 weight on a CPU: what the PyTorch twins in ../rounding.py, ../lomo.py and ../adalomo.py do in a dozen
// passes over slices. The bits are the twins'. native.py compiles this file where there is a compiler, and calls it.
//
// Products and sums are contracted only where fma() stands (compile with -ffp-contract=off), because the twins round in between.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum rounding { NEAREST = 0, STOCHASTIC = 1, COMPENSATED = 2 };
enum { CHUNK = 1 << 15, TILE = 1 << 10, LANES = 64 };  // elements that a thread takes at a time; whose noise is made at a time; partial sums side by side

#if defined(_OPENMP)
#define PARALLEL(threads) _Pragma("omp parallel for schedule(static) num_threads(threads)")
#else
#define PARALLEL(threads)
#endif

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// a + b * c, rounded once where the processor has an instruction for it, which is where torch does so, too.
INLINE float multiply_add(float b, float c, float a) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(b, c, a);
#else
    return a + b * c;
#endif
}

// Reads the halves of numbers of 32 bits.
typedef int16_t __attribute__((may_alias)) half;

// 16 bits of noise for each of `count` elements from `position` on, which is that in the whole tensor: see noise16 in rounding.py. One
// number of 32 bits serves two elements, the even one with its lower half. `room` holds TILE / 2 + 1; the noise begins where the result points to.
INLINE const half *noise(uint32_t *restrict room, uint32_t position, ptrdiff_t count, uint32_t key) {
    uint32_t odd = position & 1u, even = position - odd;
    ptrdiff_t pairs = (count + (ptrdiff_t)odd + 1) / 2;
    for (ptrdiff_t pair = 0; pair < pairs; pair++) {
        uint32_t x = ((even + 2u * (uint32_t)pair) >> 1) * 0x9E3779B9u;
        x ^= key;
        x = (x ^ (x >> 16)) * 0x7FEB352Du;
        x = (x ^ (x >> 15)) * 0x846CA68Bu;
        x ^= x >> 16;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        x = x << 16 | x >> 16;
#endif
        room[pair] = x;
    }
    return (const half *)room + odd;
}

INLINE float read_weight(const uint16_t *weight, const int16_t *rest, ptrdiff_t i, int rounding) {
    uint32_t bits = (uint32_t)weight[i] << 16;
    if (rounding == COMPENSATED) bits += (uint32_t)(int32_t)rest[i];
    return as_float(bits);
}

INLINE void write_weight(uint16_t *weight, int16_t *rest, ptrdiff_t i, float value, int32_t dither, int rounding) {
    uint32_t bits = value != value ? 0x7FC00000u : as_bits(value);
    if (rounding == NEAREST) {
        bits = value != value ? bits : bits + 0x7FFFu + ((bits >> 16) & 1u);
    } else if (rounding == STOCHASTIC) {
        bits += (uint32_t)(dither + 32768);
    } else {
        int32_t low = (int32_t)(bits << 16) >> 16;
        rest[i] = (int16_t)low;
        bits -= (uint32_t)low;
    }
    weight[i] = (uint16_t)(bits >> 16);
}

INLINE float read_grad(const void *grad, ptrdiff_t i, int is_float) {
    return is_float ? ((const float *)grad)[i] : as_float((uint32_t)((const uint16_t *)grad)[i] << 16);
}

// Not fminf and fmaxf: NaN must stay NaN.
INLINE float clamped(float x, float limit) {
    x = x < -limit ? -limit : x;
    return x > limit ? limit : x;
}

INLINE float prepared(float grad, int prepares, float inv_scale, float limit, float coefficient) {
    return prepares ? clamped(grad * inv_scale, limit) * coefficient : grad;
}

// Goes over the elements `i` of from..to in tiles; BODY may use `dither`, the noise of its element, 0 but for stochastic rounding.
#define FOR_EACH(from, to, rounding, key, start, BODY)                                                                       \
    for (ptrdiff_t tile = (from); tile < (to); tile += TILE) {                                                               \
        ptrdiff_t tile_end = tile + TILE < (to) ? tile + TILE : (to);                                                        \
        uint32_t room[TILE / 2 + 1];                                                                                         \
        const half *tile_noise = (const half *)room;                                                                         \
        if ((rounding) == STOCHASTIC) tile_noise = noise(room, (start) + (uint32_t)tile, tile_end - tile, key);              \
        for (ptrdiff_t i = tile; i < tile_end; i++) {                                                                        \
            int32_t dither = (rounding) == STOCHASTIC ? tile_noise[i - tile] : 0;                                            \
            BODY                                                                                                             \
        }                                                                                                                    \
    }

// Calls BODY with rounding, is_float and prepares as constants, so that each case is a loop of its own without branches.
#define SPECIALISE(BODY)                                   \
    switch ((rounding * 2 + is_float) * 2 + prepares) {    \
        case 0: BODY(0, 0, 0); break;                      \
        case 1: BODY(0, 0, 1); break;                      \
        case 2: BODY(0, 1, 0); break;                      \
        case 3: BODY(0, 1, 1); break;                      \
        case 4: BODY(1, 0, 0); break;                      \
        case 5: BODY(1, 0, 1); break;                      \
        case 6: BODY(1, 1, 0); break;                      \
        case 7: BODY(1, 1, 1); break;                      \
        case 8: BODY(2, 0, 0); break;                      \
        case 9: BODY(2, 0, 1); break;                      \
        case 10: BODY(2, 1, 0); break;                     \
        case 11: BODY(2, 1, 1); break;                     \
    }

INLINE void lomo_chunk(uint16_t *restrict weight, const void *restrict grad, int16_t *restrict rest, ptrdiff_t from, ptrdiff_t to,
                       float step_size, float decay, float inv_scale, float limit, float coefficient, uint32_t key, uint32_t start,
                       int rounding, int is_float, int prepares) {
    FOR_EACH(from, to, rounding, key, start, {
        float value = read_weight(weight, rest, i, rounding) * decay;
        float g = prepared(read_grad(grad, i, is_float), prepares, inv_scale, limit, coefficient);
        value = multiply_add(g, -step_size, value);
        write_weight(weight, rest, i, value, dither, rounding);
    })
}

// p = p * decay - step_size * coefficient * clamp(grad * inv_scale, -limit, limit), rounded once.
EXPORT void lomo_step(uint16_t *weight, const void *grad, int16_t *rest, ptrdiff_t numel, float step_size, float decay, float inv_scale,
                      float limit, float coefficient, uint32_t key, uint32_t start, int rounding, int is_float, int prepares,
                      int threads) {
    ptrdiff_t chunks = (numel + CHUNK - 1) / CHUNK;
    (void)threads;
    PARALLEL(threads)
    for (ptrdiff_t chunk = 0; chunk < chunks; chunk++) {
        ptrdiff_t from = chunk * CHUNK, to = from + CHUNK < numel ? from + CHUNK : numel;
#define BODY(R, F, P) \
    lomo_chunk(weight, grad, rest, from, to, step_size, decay, inv_scale, limit, coefficient, key, start, R, F, P)
        SPECIALISE(BODY)
#undef BODY
    }
}

// The same for some rows of a matrix with `cols` columns; grad has these rows only, one after the other.
EXPORT void lomo_rows(uint16_t *weight, const void *grad, int16_t *rest, const int64_t *rows, ptrdiff_t count, ptrdiff_t cols, float step_size,
                      float decay, float inv_scale, float limit, float coefficient, uint32_t key, uint32_t start, int rounding, int is_float,
                      int prepares, int threads) {
    (void)threads;
    PARALLEL(threads)
    for (ptrdiff_t i = 0; i < count; i++) {
        ptrdiff_t at = rows[i] * cols;
        const char *grad_row = (const char *)grad + i * cols * (is_float ? 4 : 2);
        int16_t *rest_row = rest == NULL ? NULL : rest + at;
        uint32_t begin = start + (uint32_t)at;
#define BODY(R, F, P) \
    lomo_chunk(weight + at, grad_row, rest_row, 0, cols, step_size, decay, inv_scale, limit, coefficient, key, begin, R, F, P)
        SPECIALISE(BODY)
#undef BODY
    }
}

INLINE void adalomo_row(uint16_t *restrict weight, const void *restrict grad, int16_t *restrict rest, ptrdiff_t from, ptrdiff_t cols,
                        float row, const float *restrict col, float scale, float decay, float inv_scale, float limit,
                        float coefficient, uint32_t key, uint32_t start, int rounding, int is_float, int prepares) {
    FOR_EACH(from, from + cols, rounding, key, start, {
        float g = prepared(read_grad(grad, i, is_float), prepares, inv_scale, limit, coefficient);
        float value = read_weight(weight, rest, i, rounding) * decay;
        value -= g * row * col[i - from] * scale;
        write_weight(weight, rest, i, value, dither, rounding);
    })
}

// p = p * decay - scale * g * row * col, rounded once; [rows, cols] are all rows of `matrices` matrices of rows / matrices each.
EXPORT void adalomo_step(uint16_t *weight, const void *grad, int16_t *rest, ptrdiff_t rows, ptrdiff_t rows_of_matrix, ptrdiff_t cols,
                         const float *row, const float *col, float scale, float decay, float inv_scale, float limit,
                         float coefficient, uint32_t key, uint32_t start, int rounding, int is_float, int prepares, int threads) {
    (void)threads;
    PARALLEL(threads)
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *cols_of = col + (r / rows_of_matrix) * cols;
        float row_factor = row == NULL ? 1.0f : row[r];
#define BODY(R, F, P)                                                                                                           \
    adalomo_row(weight, grad, rest, r *cols, cols, row_factor, cols_of, scale, decay, inv_scale, limit, coefficient, key, start, \
                R, F, P)
        SPECIALISE(BODY)
#undef BODY
    }
}

// Float32 values into the weight.
EXPORT void round_into(uint16_t *restrict weight, const float *restrict value, int16_t *restrict rest, ptrdiff_t numel, uint32_t key,
                       uint32_t start, int rounding, int threads) {
    ptrdiff_t chunks = (numel + CHUNK - 1) / CHUNK;
    (void)threads;
    PARALLEL(threads)
    for (ptrdiff_t chunk = 0; chunk < chunks; chunk++) {
        ptrdiff_t from = chunk * CHUNK, to = from + CHUNK < numel ? from + CHUNK : numel;
#define LOOP(R) FOR_EACH(from, to, R, key, start, { write_weight(weight, rest, i, value[i], dither, R); })
        if (rounding == NEAREST) {
            LOOP(NEAREST)
        } else if (rounding == STOCHASTIC) {
            LOOP(STOCHASTIC)
        } else {
            LOOP(COMPENSATED)
        }
#undef LOOP
    }
}

// Sums of squares of bfloat16 numbers, one for each chunk of CHUNK elements, whatever the number of threads.
EXPORT void sums_of_squares(const uint16_t *grad, ptrdiff_t numel, double *sums, int threads) {
    ptrdiff_t chunks = (numel + CHUNK - 1) / CHUNK;
    (void)threads;
    PARALLEL(threads)
    for (ptrdiff_t chunk = 0; chunk < chunks; chunk++) {
        ptrdiff_t i = chunk * CHUNK, to = i + CHUNK < numel ? i + CHUNK : numel;
        float lanes[LANES] = {0};
        for (; i + LANES <= to; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                float g = as_float((uint32_t)grad[i + lane] << 16);
                lanes[lane] = multiply_add(g, g, lanes[lane]);
            }
        double sum = 0.0;
        for (; i < to; i++) {
            float g = as_float((uint32_t)grad[i] << 16);
            sum += (double)g * g;
        }
        for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
        sums[chunk] = sum;
    }
}

// Rows whose squares are added to one sum a column before sums are added to each other.
enum { ROWS_OF_BLOCK = 64 };

// Calls BODY with is_float and prepares as constants.
#define SPECIALISE_GRAD(BODY)                \
    switch (is_float * 2 + prepares) {       \
        case 0: BODY(0, 0); break;           \
        case 1: BODY(0, 1); break;           \
        case 2: BODY(1, 0); break;           \
        case 3: BODY(1, 1); break;           \
    }

// The sum of g^2 + eps over a row from element `from` on; each g^2 + eps is also added to `by_column`.
INLINE float squares_of_row(const void *restrict grad, ptrdiff_t from, ptrdiff_t cols, float eps, float inv_scale, float limit,
                            float coefficient, float *restrict by_column, int is_float, int prepares) {
    float lanes[LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= cols; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float g = prepared(read_grad(grad, from + i + lane, is_float), prepares, inv_scale, limit, coefficient);
            float squared = multiply_add(g, g, eps);
            by_column[i + lane] += squared;
            lanes[lane] += squared;
        }
    double sum = 0.0;
    for (; i < cols; i++) {
        float g = prepared(read_grad(grad, from + i, is_float), prepares, inv_scale, limit, coefficient);
        float squared = multiply_add(g, g, eps);
        by_column[i] += squared;
        sum += squared;
    }
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return (float)sum;
}

INLINE void squares_of_block(const void *restrict grad, ptrdiff_t first, ptrdiff_t last, ptrdiff_t cols, float eps, float inv_scale,
                             float limit, float coefficient, float *restrict by_row, float *restrict by_column, int is_float,
                             int prepares) {
    memset(by_column, 0, (size_t)cols * sizeof *by_column);
    for (ptrdiff_t row = first; row < last; row++)
        by_row[row] = squares_of_row(grad, row * cols, cols, eps, inv_scale, limit, coefficient, by_column, is_float, prepares);
}

// Sums of g^2 + eps over each row [matrices, rows], and over each column in blocks of ROWS_OF_BLOCK rows [matrices, blocks, cols].
EXPORT void row_and_column_sums(const void *grad, ptrdiff_t matrices, ptrdiff_t rows, ptrdiff_t cols, float eps, float inv_scale,
                                float limit, float coefficient, float *by_row, float *by_column, int is_float, int prepares,
                                int threads) {
    ptrdiff_t blocks = (rows + ROWS_OF_BLOCK - 1) / ROWS_OF_BLOCK;
    (void)threads;
    PARALLEL(threads)
    for (ptrdiff_t block = 0; block < matrices * blocks; block++) {
        ptrdiff_t matrix = block / blocks, begin = block % blocks * ROWS_OF_BLOCK;
        ptrdiff_t end = begin + ROWS_OF_BLOCK < rows ? begin + ROWS_OF_BLOCK : rows;
#define BODY(F, P)                                                                                                            \
    squares_of_block(grad, matrix *rows + begin, matrix *rows + end, cols, eps, inv_scale, limit, coefficient, by_row,         \
                     by_column + block * cols, F, P)
        SPECIALISE_GRAD(BODY)
#undef BODY
    }
}

INLINE float weighted_squares_of_row(const void *restrict grad, ptrdiff_t from, ptrdiff_t cols, const float *restrict weights,
                                     float inv_scale, float limit, float coefficient, int is_float, int prepares) {
    float lanes[LANES] = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= cols; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            float g = prepared(read_grad(grad, from + i + lane, is_float), prepares, inv_scale, limit, coefficient);
            lanes[lane] = multiply_add(g * g, weights[i + lane], lanes[lane]);
        }
    double sum = 0.0;
    for (; i < cols; i++) {
        float g = prepared(read_grad(grad, from + i, is_float), prepares, inv_scale, limit, coefficient);
        sum += (double)(g * g) * weights[i];
    }
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return (float)sum;
}

// Sums of g^2 * weight over each row [matrices, rows]; weights are [matrices, cols].
EXPORT void weighted_row_sums(const void *grad, ptrdiff_t matrices, ptrdiff_t rows, ptrdiff_t cols, const float *weights,
                              float inv_scale, float limit, float coefficient, float *by_row, int is_float, int prepares, int threads) {
    (void)threads;
    PARALLEL(threads)
    for (ptrdiff_t row = 0; row < matrices * rows; row++) {
#define BODY(F, P)                                                                                                       \
    by_row[row] = weighted_squares_of_row(grad, row *cols, cols, weights + row / rows * cols, inv_scale, limit, coefficient, F, P)
        SPECIALISE_GRAD(BODY)
#undef BODY
    }
}

// A square of SIDE x SIDE numbers is turned by five rounds of interleaving its rows, in registers where the processor has them.
enum { SIDE = 32 };

#if defined(__AVX512BW__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define IN_REGISTERS
#endif
#endif

#ifdef IN_REGISTERS
typedef uint16_t row32 __attribute__((vector_size(2 * SIDE)));

#define EVEN(a, b)                                                                                                                \
    __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, \
                            45, 14, 46, 15, 47)
#define ODD(a, b)                                                                                                                   \
    __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, \
                            28, 60, 29, 61, 30, 62, 31, 63)

INLINE void interleave(const row32 *restrict from, row32 *restrict to) {
    for (int k = 0; k < SIDE / 2; k++) {
        to[2 * k] = EVEN(from[k], from[k + SIDE / 2]);
        to[2 * k + 1] = ODD(from[k], from[k + SIDE / 2]);
    }
}

INLINE void turn_square(const uint16_t *restrict in, ptrdiff_t stride, uint16_t *restrict out, ptrdiff_t out_stride) {
    row32 a[SIDE], b[SIDE];
    for (int k = 0; k < SIDE; k++) memcpy(&a[k], in + k * stride, sizeof a[k]);
    interleave(a, b);
    interleave(b, a);
    interleave(a, b);
    interleave(b, a);
    interleave(a, b);
    for (int k = 0; k < SIDE; k++) memcpy(out + k * out_stride, &b[k], sizeof b[k]);
}
#else
INLINE void turn_square(const uint16_t *restrict in, ptrdiff_t stride, uint16_t *restrict out, ptrdiff_t out_stride) {
    for (int column = 0; column < SIDE; column++)
        for (int row = 0; row < SIDE; row++) out[column * out_stride + row] = in[row * stride + column];
}
#endif

// A matrix of 16-bit numbers, [rows, cols] with `stride` numbers from row to row, into its transpose [cols, rows], contiguous.
EXPORT void transpose(const uint16_t *restrict in, ptrdiff_t stride, uint16_t *restrict out, ptrdiff_t rows, ptrdiff_t cols, int threads) {
    ptrdiff_t strips = (cols + SIDE - 1) / SIDE;
    (void)threads;
    PARALLEL(threads)
    for (ptrdiff_t strip = 0; strip < strips; strip++) {
        ptrdiff_t from = strip * SIDE, to = from + SIDE < cols ? from + SIDE : cols, row = 0;
        if (to - from == SIDE)
            for (; row + SIDE <= rows; row += SIDE) turn_square(in + row * stride + from, stride, out + from * rows + row, rows);
        for (ptrdiff_t column = from; column < to; column++)
            for (ptrdiff_t rest = row; rest < rows; rest++) out[column * rows + rest] = in[rest * stride + column];
    }
}

#include "product.h"

EXPORT int chunk_numel(void) { return CHUNK; }
EXPORT int rows_of_block(void) { return ROWS_OF_BLOCK; }
