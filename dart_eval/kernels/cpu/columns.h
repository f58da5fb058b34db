// One token through a gated FFN of 8-bit codes, of whose columns it reads the first 0, 2, 4, 6 or 8 bits (GradedColumns).
//
// Bits lie in planes of 2. A block of 256 rows has [width][4 planes][64 bytes]: what is read of a column is one run of
// lines. Byte j of a plane has place j of four quarters of 64 rows, the first in its lowest bits. A last block of 128 rows
// has planes of 32 bytes: places j and 32 + j of two quarters. Places are permuted as down's are (`ORDER` in packing.py).
// Included by kernels.c, once for each WIDE.
DEF(Bytes, plane)(const uint8_t *p, int half) {  // in four quarters; of half a block the second and fourth are not used
#if WIDE
    if (!half) return LOAD(p);
    return F(srlv_epi32)(_mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)p)), F(set_epi32)(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0));
#else
    Ints v = LOAD(p);
    return (Pair){v, half ? F(srli_epi16)(v, 2) : LOAD(p + 32)};
#endif
}
DEF(Bytes, quarter)(Bytes v, int q, int to) {  // its bits, moved to bit `to`
    int by = to - 2 * q;
    Ints mask = F(set1_epi8)((char)(3 << to));
#if WIDE
    return AND(by < 0 ? F(srli_epi16)(v, (unsigned)-by) : F(slli_epi16)(v, (unsigned)by), mask);
#else
    Ints a = by < 0 ? F(srli_epi16)(v.a, -by) : F(slli_epi16)(v.a, by), b = by < 0 ? F(srli_epi16)(v.b, -by) : F(slli_epi16)(v.b, by);
    return (Pair){AND(a, mask), AND(b, mask)};
#endif
}
DEF(Bytes, both)(Bytes a, Bytes b) {
#if WIDE
    return _mm512_or_si512(a, b);
#else
    return (Pair){_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)};
#endif
}

// Of one plane alone, what its 2 bits stand for: of all 8 bits, or of the first 4 and the last ones (`part`)
DEF(Bytes, meaning)(Bytes v, int q, const uint8_t *table, int part) {
    Bytes at = FN(quarter)(v, q, 0);
#if WIDE
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)), at);
#else
    Ints values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)), mask = F(set1_epi8)(15);
    values = AND(part ? values : F(srli_epi16)(values, 4), mask);
    return (Pair){F(shuffle_epi8)(values, at.a), F(shuffle_epi8)(values, at.b)};
#endif
}

// sums += a quarter of 4 columns, of `planes` planes, times their numbers
DEF(void, quad)(const uint8_t *base, size_t step, const int32_t *column, int planes, const uint8_t *table, int q, int half, int high,
               int low, Bytes *sums, Bytes *lows) {
    int together = WIDE ? 4 : 2;  // that fit into a byte: of AVX2's products 4 bits
    _Pragma("GCC unroll 2") for (int from = 0; from < (planes == 1 ? 4 : planes); from += together) {
        Bytes v[4];
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
            const uint8_t *p = base + (size_t)column[i] * (half ? 32 : 64);
            v[i] = planes == 1 ? FN(meaning)(FN(plane)(p, half), q, table, from) : FN(none)();
            if (planes > 1) _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++)
                if (j >= from && j < planes && j < from + together) v[i] = FN(both)(v[i], FN(quarter)(FN(plane)(p + step * j, half), q, WIDE ? 6 - 2 * j : 2 - 2 * (j % 2)));
        }
        Bytes a = UNPACK(lo_epi8, v[0], v[1]), b = UNPACK(lo_epi8, v[2], v[3]), u[4];
        u[0] = UNPACK(lo_epi16, a, b), u[1] = UNPACK(hi_epi16, a, b);
        a = UNPACK(hi_epi8, v[0], v[1]), b = UNPACK(hi_epi8, v[2], v[3]);
        u[2] = UNPACK(lo_epi16, a, b), u[3] = UNPACK(hi_epi16, a, b);
        _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
#if WIDE
            FN(add)(sums + i, lows + i, u[i], u[i], 0, high, low);
#else
            sums[i].a = F(add_epi32)(sums[i].a, FN(times)(u[i].a, high, low, from ? 0 : 4));
            sums[i].b = F(add_epi32)(sums[i].b, FN(times)(u[i].b, high, low, from ? 0 : 4));
#endif
        }
    }
}

// The first line of what a token reads of a column of a group, and the lines of its other planes, are fetched
DEF(void, fetch)(const Matrix *M, int n, int g, int at) {
    int half = 256 * (n + 1) > M->rows, size = g + 1 < M->groups ? M->group : M->width - g * M->group;
    size_t line = half ? 32 : 64;
    const int32_t *end = M->ends + 4 * g;
    const uint8_t *p = M->planes + (size_t)n * M->width * 256 + 4 * (size_t)g * M->group * line + (size_t)M->list[g * ROOM + at] * line;
    for (int i = 0; i < 4; i++, p += size * line) if (at < end[i]) PREFETCH(p);
}

// out[256 or 128] of block n: the product with the columns that a token reads. next: the block that comes after it
#if WIDE
IN  // twice, for whole blocks and halves
#else
static  // once: it is long, and takes a compiler long
#endif
HAS void FN(of_block)(const Matrix *M, int n, int half, int next, float *out) {
    const uint8_t *base = M->planes + (size_t)n * M->width * 256;
    const uint16_t *scale = M->scales + (size_t)n * M->groups * 256;
    memset(out, 0, half ? 512 : 1024);
    size_t line = half ? 32 : 64, step = M->group * line;
    for (int g = 0; g < M->groups; g++, scale += half ? 128 : 256, base += 4 * step) {
        const int32_t *list = M->list + g * ROOM, *end = M->ends + 4 * g;
        const int8_t *high = M->high + g * ROOM, *low = M->low + g * ROOM;
        int block = g + 1 < M->groups ? n : next, group = g + 1 < M->groups ? g + 1 : 0, ahead = 0;
        int fetched = block < 0 ? 0 : M->ends[4 * group];
        if (g + 1 == M->groups) step = (M->width - g * M->group) * line;
        for (int q = 0; q < (half ? 2 : 4); q++) {
            Bytes sums[4], lows[4];
            for (int i = 0; i < 4; i++) sums[i] = lows[i] = FN(none)();
            int at = 0, hs, ls;
#define QUADS(planes, Q) for (; at < end[planes - 1]; at += 4) { \
                memcpy(&hs, high + at, 4), memcpy(&ls, low + at, 4); \
                if (ahead < fetched) FN(fetch)(M, block, group, ahead++); \
                FN(quad)(base, step, list + at, planes, M->table, Q, half, hs, ls, sums, lows); }
#define EACH(Q) QUADS(4, Q) QUADS(3, Q) QUADS(2, Q) QUADS(1, Q)
            int part = half ? 2 * q : q;  // of half a block each second one
            if (part == 0) { EACH(0) } else if (part == 1) { EACH(1) } else if (part == 2) { EACH(2) } else { EACH(3) }
            for (int i = 0; i < 4; i++)
                FN(flush)(out + 64 * q + 16 * i, scale + 64 * q + 16 * i, sums[i], lows[i], M->unit[g], M->offset[g]);
        }
        while (ahead < fetched) FN(fetch)(M, block, group, ahead++);
    }
}
DEF(void, product)(const Matrix *M, int from, int to, float *out) {  // of blocks
    for (int n = from; n < to; n++, out += 256) {
        int next = n + 1 < to ? n + 1 : -1;
        int half = 256 * (n + 1) > M->rows;
        if (WIDE && !half) FN(of_block)(M, n, 0, next, out); else FN(of_block)(M, n, WIDE ? 1 : half, next, out);
    }
}

// The k-th largest of n scores (the bits of numbers >= 0 are ordered as they are), and how many that equal it are among k
HAS static int32_t FN(least)(const int32_t *v, int n, int k, int *ties) {
    int32_t low = 0, high = 0x7f800001;  // at least k are >= low, fewer are >= high
    int c = -1;
    while (high - low > 1 && c != k) {
        int32_t middle = low + (high - low) / 2;
        c = 0;
        for (int i = 0; i < n; i++) c += v[i] >= middle;
        if (c >= k) low = middle; else high = middle;
    }
    *ties = k;
    for (int i = 0; i < n; i++) *ties -= v[i] > low;
    return low;
}
// Whom a token reads, and in how many planes: of all steps x^2 * gain those `steps` that are largest. False: x is broken
HAS static int FN(plan)(Matrix *M, const float *x) {
    int n = M->width, ties;
    float *score = M->scratch;
    for (int i = 0; i < n; i++) if (!(fabsf(x[i]) <= FLT_MAX)) return 0;
    for (int l = 0; l < 4; l++) for (int i = 0; i < n; i++) {
        float s = x[i] * x[i] * M->gain[l];
        score[l * n + i] = s <= FLT_MAX ? s : INFINITY;
    }
    const int32_t *v = (const int32_t *)score;
    int32_t least = FN(least)(v, 4 * n, M->steps, &ties);
    uint8_t *level = M->level;
    memset(level, 0, (size_t)n);
    for (int l = 0; l < 4; l++, v += n) {
        for (int i = 0; i < n; i++) level[i] += v[i] > least;
        for (int i = 0; i < n && ties; i++) if (v[i] == least) level[i]++, ties--;
    }
    for (int g = 0; g < M->groups; g++) {
        int from = g * M->group, to = from + M->group < n ? from + M->group : n, at = 0;
        int32_t *list = M->list + g * ROOM;
        float most = 0, c[MOST_GROUP], sum = 0;
        for (int i = from; i < to; i++) {
            c[i - from] = x[i] * M->slope[level[i]];
            most = fabsf(c[i - from]) > most ? fabsf(c[i - from]) : most;
        }
        float inverse = most > 1e-30f ? 16256.f / most : 0.f;
        int8_t *high = M->high + g * ROOM, *low = M->low + g * ROOM;
        int32_t w[MOST_GROUP], place[5] = {ROOM - 1}, count[5] = {0};
        memset(high, 0, ROOM);
        memset(low, 0, ROOM);
        memset(list, 0, ROOM * 4);
        for (int i = 0; i < to - from; i++) {
            w[i] = NEAREST(c[i] * inverse);
            sum += (float)w[i] * M->start[level[from + i]];
            count[level[from + i]]++;
        }
        for (int p = 4; p; p--) {
            place[p] = at;
            M->ends[4 * g + p - 1] = at += (count[p] + 3) / 4 * 4;
        }
        for (int i = 0; i < to - from; i++) {  // those of no plane go to the last place, of no list
            int p = level[from + i], k = place[p], h = (w[i] + 64) >> 7;
            list[k] = i, high[k] = (int8_t)h, low[k] = (int8_t)(w[i] - 128 * h);
            place[p] += p > 0;
        }
        M->unit[g] = most / 16256.f, M->offset[g] = sum * M->unit[g];
    }
    return 1;
}

HAS static void FN(columns)(const void *of, int me, int all) {
    const Columns *L = of;
    static Matrix m[3];
    static int finite;
    if (me == 0) {
        memcpy(m, L->matrices, sizeof m);
        finite = FN(plan)(m, L->x) && FN(plan)(m + 1, L->x);
    }
    meet(all);
    int blocks = (m[0].rows + 255) / 256, from = PART(blocks, me, all), to = PART(blocks, me + 1, all);
    float *h = L->scratch, *u = h + 256 * blocks, *o = u + 256 * blocks;
    if (finite) {
        FN(product)(m, from, to, h + 256 * from);
        FN(product)(m + 1, from, to, u + 256 * from);
        for (int r = 256 * from; r < 256 * to; r++) h[r] = activate(L->act, h[r]) * u[r];
    }
    meet(all);
    if (me == 0 && finite) finite = FN(plan)(m + 2, h);
    meet(all);
    blocks = (m[2].rows + 255) / 256, from = PART(blocks, me, all), to = PART(blocks, me + 1, all);
    if (finite) FN(product)(m + 2, from, to, o + 256 * from);
    for (int r = 256 * from; r < 256 * to && r < L->width; r++) L->out[r] = finite ? o[r] : NAN;
}
