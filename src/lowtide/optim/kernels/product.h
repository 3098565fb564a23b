// The gradient of a linear layer's weight, left.T @ right, by the tiles of Intel's AMX, applied to the weight while it is made: a value of the
// gradient goes from the tile into the update and is never in memory, and the weight is read and written while the next tile is computed.
//
// left is [T, O] (the gradient of the output), right [T, I] (the input), the weight [O, I]; T = tokens. Part of cpu.c.
//
// Both factors are copied into tiles. Of the left one SIDE columns are a panel, [T / SIDE][2][16 rows of the product][SIDE tokens]; of the right one,
// [T / SIDE][2][16 pairs of tokens][16 columns][2]. Missing tokens are zero. A thread takes a few panels of the left one, whose copies stay in its
// cache, and goes over the right one in blocks of columns; each pair is a block of SIDE rows of the product, which is finished row by row while the next
// one is computed.

// Asked for by a macro: a compiler may know the instructions and its assembler not.
#if defined(LOWTIDE_TILES) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(IN_REGISTERS) && defined(__linux__)
#define TILES
#endif

enum { NONE = 3 };  // beside the roundings: nothing is updated

#ifdef TILES

#include <immintrin.h>
#include <sys/syscall.h>

extern long syscall(long, ...);

// Asks the system for the tiles, which it gives to a process that asks. 0: it does not.
EXPORT int tiles_allowed(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// What was stored before is in memory: tiles are read by instructions of which a compiler does not know what they read.
#define STORED __asm__ volatile("" ::: "memory")

enum { SQUARE = SIDE * SIDE, MOST_PANELS = 8, MOST_COLUMNS = 8 * SIDE };

static void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } all;
    memset(&all, 0, sizeof all);
    all.palette = 1;
    for (int tile = 0; tile < 8; tile++) all.row_bytes[tile] = 64, all.rows[tile] = 16;
    __asm__ volatile("" ::"r"(&all) : "memory");
    _tile_loadconfig(&all);
}

// What both packings do with SIDE tokens: complete ones where they lie, the last few beside zeros.
INLINE const uint16_t *whole_square(const uint16_t *in, ptrdiff_t *stride, ptrdiff_t tokens, uint16_t *room) {
    if (tokens >= SIDE) return in;
    memset(room, 0, SQUARE * sizeof *room);
    for (ptrdiff_t token = 0; token < tokens; token++) memcpy(room + token * SIDE, in + token * *stride, SIDE * sizeof *room);
    *stride = SIDE;
    return room;
}

INLINE void pack_left(const uint16_t *in, ptrdiff_t stride, ptrdiff_t tokens, uint16_t *out) {
    uint16_t room[SQUARE];
    for (ptrdiff_t token = 0; token < tokens; token += SIDE, out += SQUARE) {
        ptrdiff_t step = stride;
        const uint16_t *square = whole_square(in + token * stride, &step, tokens - token, room);
        turn_square(square, step, out, SIDE);
    }
}

INLINE __m512i larger(__m512i largest, __m512i bits) {
    return _mm512_max_epu16(largest, _mm512_and_si512(bits, _mm512_set1_epi16(0x7FFF)));
}

INLINE uint32_t largest_of(__m512i largest) {
    uint16_t each[SIDE];
    _mm512_storeu_si512(each, largest);
    uint32_t found = 0;
    for (int i = 0; i < SIDE; i++) found = each[i] > found ? each[i] : found;
    return found;
}

// Returns the largest bits without sign, as all below: infinity and NaN are larger than any number.
INLINE uint32_t pack_right(const uint16_t *in, ptrdiff_t stride, ptrdiff_t tokens, uint16_t *out) {
    uint16_t room[SQUARE];
    __m512i largest = _mm512_setzero_si512();
    for (ptrdiff_t token = 0; token < tokens; token += SIDE, out += SQUARE) {
        ptrdiff_t step = stride;
        const uint16_t *square = whole_square(in + token * stride, &step, tokens - token, room);
        for (int pair = 0; pair < SIDE / 2; pair++) {
            row32 a, b;
            memcpy(&a, square + 2 * pair * step, sizeof a);
            memcpy(&b, square + (2 * pair + 1) * step, sizeof b);
            largest = larger(larger(largest, (__m512i)a), (__m512i)b);
            row32 first = EVEN(a, b), second = ODD(a, b);
            memcpy(out + pair * SIDE, &first, sizeof first);
            memcpy(out + SQUARE / 2 + pair * SIDE, &second, sizeof second);
        }
    }
    return largest_of(largest);
}

INLINE uint32_t largest_in_row(const uint16_t *row, ptrdiff_t numel) {
    __m512i largest = _mm512_setzero_si512();
    for (ptrdiff_t i = 0; i < numel; i += SIDE) largest = larger(largest, _mm512_loadu_si512(row + i));
    return largest_of(largest);
}

// Copies the right factor into tiles, at `packed`, and looks for the largest bits of each factor.
EXPORT void product_begin(const uint16_t *left, ptrdiff_t left_stride, const uint16_t *right, ptrdiff_t right_stride, ptrdiff_t tokens,
                          ptrdiff_t rows, ptrdiff_t cols, uint16_t *packed, uint32_t *largest, int threads) {
    ptrdiff_t panel_numel = (tokens + SIDE - 1) / SIDE * SQUARE;
    uint32_t of_left = 0, of_right = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(max : of_left, of_right)
#endif
    {
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (ptrdiff_t panel = 0; panel < cols / SIDE; panel++) {
            uint32_t found = pack_right(right + panel * SIDE, right_stride, tokens, packed + panel * panel_numel);
            of_right = found > of_right ? found : of_right;
        }
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (ptrdiff_t token = 0; token < tokens; token++) {
            uint32_t found = largest_in_row(left + token * left_stride, rows);
            of_left = found > of_left ? found : of_left;
        }
    }
    largest[0] = of_left, largest[1] = of_right;
}

// What becomes of the product.
struct sink {
    uint16_t *grad, *weight;  // grad: NULL where nobody wants it
    int16_t *rest;
    float step_size, decay;
    uint32_t key, start;
    __m512 squares;
};

INLINE __m512 lower(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
INLINE __m512 upper(__m512i pairs) { return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000u)); }
INLINE __m512i halves(__m512i low, __m512i high) { return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(low, 16), high); }

// noise() for 32 elements from an even position on: the lower half of a number is that of the even one.
INLINE __m512i noise_of_pairs(uint32_t position, uint32_t key) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i x = _mm512_add_epi32(_mm512_set1_epi32((int)(position >> 1)), lanes);
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32((int)0x9E3779B9u));
    x = _mm512_xor_si512(x, _mm512_set1_epi32((int)key));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x7FEB352D));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), _mm512_set1_epi32((int)0x846CA68Bu));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

INLINE __m512i add_to_finite(__m512 value, __m512i dither, int always) {
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    __m512i bits = _mm512_mask_mov_epi32((__m512i)value, is_nan, _mm512_set1_epi32(0x7FC00000));
    return always ? _mm512_add_epi32(bits, dither) : _mm512_mask_add_epi32(bits, (__mmask16)~is_nan, bits, dither);
}

INLINE __m512i even_up(__m512 value) {
    __m512i lowest = _mm512_and_si512(_mm512_srli_epi32((__m512i)value, 16), _mm512_set1_epi32(1));
    return add_to_finite(value, _mm512_add_epi32(lowest, _mm512_set1_epi32(0x7FFF)), 0);
}

// 32 values of the product that lie side by side at `at`: lomo_chunk for them, with the gradient rounded to bfloat16 as always.
INLINE void finish(struct sink *sink, const float *values, ptrdiff_t at, int rounding) {
    __m512i grad = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values));
    if (sink->grad) _mm512_storeu_si512(sink->grad + at, grad);
    __m512 g0 = lower(grad), g1 = upper(grad);
    sink->squares = _mm512_fmadd_ps(g0, g0, sink->squares);
    sink->squares = _mm512_fmadd_ps(g1, g1, sink->squares);
    if (rounding == NONE) return;

    __m512i weight = _mm512_loadu_si512(sink->weight + at);
    __m512 w0 = lower(weight), w1 = upper(weight);
    if (rounding == COMPENSATED) {
        __m512i rest = _mm512_loadu_si512(sink->rest + at);
        w0 = (__m512)_mm512_add_epi32((__m512i)w0, _mm512_srai_epi32(_mm512_slli_epi32(rest, 16), 16));
        w1 = (__m512)_mm512_add_epi32((__m512i)w1, _mm512_srai_epi32(rest, 16));
    }
    __m512 decay = _mm512_set1_ps(sink->decay), step = _mm512_set1_ps(-sink->step_size);
    w0 = _mm512_fmadd_ps(g0, step, _mm512_mul_ps(w0, decay));
    w1 = _mm512_fmadd_ps(g1, step, _mm512_mul_ps(w1, decay));

    __m512i b0, b1;
    if (rounding == NEAREST) {
        b0 = even_up(w0), b1 = even_up(w1);
    } else if (rounding == STOCHASTIC) {
        __m512i noise = noise_of_pairs(sink->start + (uint32_t)at, sink->key), half_way = _mm512_set1_epi32(32768);
        b0 = add_to_finite(w0, _mm512_add_epi32(_mm512_srai_epi32(_mm512_slli_epi32(noise, 16), 16), half_way), 1);
        b1 = add_to_finite(w1, _mm512_add_epi32(_mm512_srai_epi32(noise, 16), half_way), 1);
    } else {
        b0 = add_to_finite(w0, _mm512_setzero_si512(), 1), b1 = add_to_finite(w1, _mm512_setzero_si512(), 1);
        _mm512_storeu_si512(sink->rest + at, _mm512_mask_blend_epi16(0xAAAAAAAAu, b0, _mm512_slli_epi32(b1, 16)));
        b0 = _mm512_sub_epi32(b0, _mm512_srai_epi32(_mm512_slli_epi32(b0, 16), 16));
        b1 = _mm512_sub_epi32(b1, _mm512_srai_epi32(_mm512_slli_epi32(b1, 16), 16));
    }
    _mm512_storeu_si512(sink->weight + at, halves(b0, b1));
}

// A block of SIDE rows of the product, its values one row after the other with MOST_COLUMNS of them from row to row, and where it belongs.
struct block {
    float *values;
    ptrdiff_t at;
    int row, column, columns;  // the next ones
};

INLINE void finish_some(struct block *block, struct sink *sink, ptrdiff_t stride, int count, int rounding) {
    for (; count > 0 && block->row < SIDE; count--) {
        ptrdiff_t column = block->column;
        finish(sink, block->values + block->row * MOST_COLUMNS + column, block->at + block->row * stride + column, rounding);
        block->column += SIDE;
        if (block->column == block->columns) block->column = 0, block->row++;
    }
}

INLINE void fetch_some(struct block *block, const uint16_t *weight, ptrdiff_t stride, int count) {
    for (; count > 0 && block->row < SIDE; count--) {
        __builtin_prefetch(weight + block->at + block->row * stride + block->column, 1);
        block->column += SIDE;
        if (block->column == block->columns) block->column = 0, block->row++;
    }
}

// Sums of squares, one for each block in the order of rows and columns, which is the same for any number of threads.
INLINE void close_block(struct block *block, struct sink *sink, ptrdiff_t stride, ptrdiff_t block_columns, double *sums, int rounding) {
    if (block->values == NULL) return;
    finish_some(block, sink, stride, SQUARE, rounding);
    ptrdiff_t row = block->at / stride / SIDE, column = block->at % stride / block_columns;
    sums[row * ((stride + block_columns - 1) / block_columns) + column] = _mm512_reduce_add_ps(sink->squares);
    sink->squares = _mm512_setzero_ps();
}

INLINE void product_panels(const uint16_t *left, const uint16_t *packed, ptrdiff_t squares, ptrdiff_t first_row, int panels, ptrdiff_t cols,
                           ptrdiff_t block_columns, float *room, struct sink *sink, double *sums, int rounding) {
    int at_once = (int)((SIDE + squares - 1) / squares);  // pieces of a row that are finished beside SIDE tokens of the next block
    struct block before = {NULL, 0, SIDE, 0, 0};
    for (ptrdiff_t column = 0; column < cols; column += block_columns) {
        int columns = (int)(column + block_columns < cols ? block_columns : cols - column);
        for (int panel = 0; panel < panels; panel++) {
            const uint16_t *a = left + panel * squares * SQUARE;
            ptrdiff_t at = (first_row + panel * SIDE) * cols + column;
            struct block now = {before.values == room ? room + SIDE * MOST_COLUMNS : room, at, 0, 0, columns}, ahead = now;
            for (int j = 0; j < columns; j += SIDE) {
                const uint16_t *b = packed + (column + j) * squares * SIDE;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (ptrdiff_t k = 0; k < squares * SQUARE; k += SQUARE) {
                    _tile_loadd(4, a + k, 64);
                    _tile_loadd(6, b + k, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(7, b + k + SQUARE / 2, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_loadd(5, a + k + SQUARE / 2, 64);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                    if (rounding != NONE) fetch_some(&ahead, sink->weight, cols, at_once);
                    finish_some(&before, sink, cols, at_once, rounding);
                }
                float *to = now.values + j;
                _tile_stored(0, to, MOST_COLUMNS * sizeof(float));
                _tile_stored(1, to + 16, MOST_COLUMNS * sizeof(float));
                _tile_stored(2, to + 16 * MOST_COLUMNS, MOST_COLUMNS * sizeof(float));
                _tile_stored(3, to + 16 * MOST_COLUMNS + 16, MOST_COLUMNS * sizeof(float));
            }
            close_block(&before, sink, cols, block_columns, sums, rounding);
            before = now;
        }
    }
    close_block(&before, sink, cols, block_columns, sums, rounding);
}

// How many columns a block has: as many as lie in half of a cache of a core, up to MOST_COLUMNS.
INLINE ptrdiff_t columns_of_block(ptrdiff_t squares) {
    ptrdiff_t fitting = 256 / squares;  // MOST_COLUMNS up to 1024 tokens
    return SIDE * (fitting < 2 ? 2 : fitting > MOST_COLUMNS / SIDE ? MOST_COLUMNS / SIDE : fitting);
}

EXPORT ptrdiff_t product_blocks(ptrdiff_t tokens, ptrdiff_t rows, ptrdiff_t cols) {
    ptrdiff_t columns = columns_of_block((tokens + SIDE - 1) / SIDE);
    return rows / SIDE * ((cols + columns - 1) / columns);
}

// Bytes that a thread wants beside the packed right factor.
EXPORT ptrdiff_t product_room(ptrdiff_t tokens) {
    ptrdiff_t squares = (tokens + SIDE - 1) / SIDE;
    return MOST_PANELS * squares * SQUARE * (ptrdiff_t)sizeof(uint16_t) + 2 * SIDE * MOST_COLUMNS * (ptrdiff_t)sizeof(float);
}

// After product_begin. `rooms` holds product_room bytes for every thread, `sums` has product_blocks numbers. grad and weight may be NULL, with rounding NONE.
EXPORT void product_end(const uint16_t *left, ptrdiff_t left_stride, const uint16_t *packed, ptrdiff_t tokens, ptrdiff_t rows, ptrdiff_t cols,
                        uint16_t *grad, uint16_t *weight, int16_t *rest, float step_size, float decay, uint32_t key, uint32_t start,
                        int rounding, double *sums, char *rooms, int threads) {
    ptrdiff_t squares = (tokens + SIDE - 1) / SIDE, block_columns = columns_of_block(squares);
    ptrdiff_t most = 256 / squares < 1 ? 1 : 256 / squares > MOST_PANELS ? MOST_PANELS : 256 / squares;
    while (most > 1 && rows / SIDE / most < 2 * threads) most /= 2;  // something to do for every thread
    ptrdiff_t room_bytes = product_room(tokens), parts = (rows / SIDE + most - 1) / most;
    int next_room = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        int which = 0;
#ifdef _OPENMP
#pragma omp atomic capture
#endif
        which = next_room++;
        uint16_t *panels = (uint16_t *)(rooms + which * room_bytes);
        float *values = (float *)(panels + MOST_PANELS * squares * SQUARE);
        configure_tiles();
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (ptrdiff_t part = 0; part < parts; part++) {
            ptrdiff_t row = part * most * SIDE;
            int count = (int)((rows - row) / SIDE < most ? (rows - row) / SIDE : most);
            for (int panel = 0; panel < count; panel++)
                pack_left(left + row + panel * SIDE, left_stride, tokens, panels + panel * squares * SQUARE);
            STORED;
            struct sink sink = {grad, weight, rest, step_size, decay, key, start, _mm512_setzero_ps()};
#define BODY(R) product_panels(panels, packed, squares, row, count, cols, block_columns, values, &sink, sums, R)
            switch (rounding) {
                case NEAREST: BODY(NEAREST); break;
                case STOCHASTIC: BODY(STOCHASTIC); break;
                case COMPENSATED: BODY(COMPENSATED); break;
                default: BODY(NONE);
            }
#undef BODY
        }
        _tile_release();
    }
}

#else

EXPORT int tiles_allowed(void) { return 0; }

#endif
