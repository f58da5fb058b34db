// Coded weights, as kernels.c describes them: the FFN of rounding. Read twice, as vectors.h is.

HAS static void FN(prepare)(const Coded *L, Numbers *q) {  // x as whole numbers
    for (int c = 0; c < L->chunks && !q->broken; c++) {
        int from = c * COLUMNS, n = L->width - from < COLUMNS ? L->width - from : COLUMNS, sum = 0;
        float x[COLUMNS] = {0}, most = 0;
        memcpy(x, L->x + from, (size_t)n * 4);
        for (int d = 0; d < COLUMNS; d++) {
            most = fabsf(x[d]) > most ? fabsf(x[d]) : most;
            q->broken |= !(fabsf(x[d]) <= FLT_MAX);
        }
        float inverse = most > 1e-30f && !q->broken ? 16256.f / most : 0.f;
        for (int d = 0; d < COLUMNS; d++) {
            int v = inverse ? NEAREST(x[d] * inverse) : 0;
            q->high[from + d] = (int8_t)((v + 64) >> 7);
            q->low[from + d] = (int8_t)(v - 128 * q->high[from + d]);
            sum += v;
        }
        q->scale[c] = most / 16256.f;
        q->sum[c] = (float)sum;
    }
}

// [2][padded], of gate and up: sums of scale * x * bits, and of scale * x. planes: of `bits` bits, interleaved
DEF(void, multiply)(const Coded *L, const Numbers *q, const uint8_t *planes, int bits, int from, int to, float *sums, float *shifts) {
    const uint8_t *p = planes + (size_t)from * L->chunks * 32 * bits;
    for (int n = from; n < to; n += 4) {
        const uint16_t *scale = L->scales + (size_t)n * (L->step ? L->chunks : 1) * 2;
        float each[8];
        Floats f[8];
        __m256 o = _mm256_setzero_ps(), s;
        for (int i = 0; i < 8; i++) f[i] = F(setzero_ps)();
        for (int c = 0; c < L->chunks; c++, p += 128 * bits, scale += L->step) {
            const int8_t *x = q->high + c * COLUMNS, *y = q->low + c * COLUMNS;
            s = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const void *)scale)), _mm256_set1_ps(q->scale[c]));
            _mm256_storeu_ps(each, s);
            o = _mm256_fmadd_ps(s, _mm256_set1_ps(q->sum[c]), o);
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)
                f[i] = F(fmadd_ps)(FN(dots)(p + 16 * bits * i, bits, x, y), F(set1_ps)(each[i]), f[i]);
        }
        _mm256_storeu_ps(each, o);
        for (int i = 0; i < 8; i++) {
            sums[i % 2 * L->padded + n + i / 2] = FN(sum)(f[i]);
            if (shifts) shifts[i % 2 * L->padded + n + i / 2] = each[i];
        }
    }
}

// out += rows of down of the BLOCK neurons from n on, times h
DEF(void, down)(const Coded *L, int n, const float *h, int last_bits, float *out) {
    size_t bytes = (size_t)last_bits * 16, chunks = (size_t)L->chunks;
    const uint8_t *first = L->dfirst + (size_t)n * chunks * 64, *last = L->dlast + (size_t)n * chunks * bytes;
    int8_t high[BLOCK], low[BLOCK];
    float most = 0;
    int sum = 0, broken = 0;
    for (int i = 0; i < BLOCK; i++) {
        most = fabsf(h[i]) > most ? fabsf(h[i]) : most;
        broken |= !(fabsf(h[i]) <= FLT_MAX);
    }
    for (int i = 0; i < BLOCK; i++) {
        int v = most > 1e-30f && !broken ? NEAREST(h[i] * (16256.f / most)) : 0;
        high[i] = (int8_t)((v + 64) >> 7);
        low[i] = (int8_t)(v - 128 * high[i]);
        sum += v;
    }
    float unit = broken ? NAN : most / 16256.f, offset = -(float)L->zero * unit * (float)sum;
    const uint16_t *scale = L->dscales + (L->group ? (size_t)(n / L->group) * chunks * COLUMNS : 0);
    for (int c = 0; c < L->chunks; c++, out += COLUMNS, scale += COLUMNS, first += BLOCK * 64, last += BLOCK * bytes) {
        Bytes sums[8], lows[8], v[4], u[2][4], part[2][2];
        for (int i = 0; i < 8; i++) sums[i] = lows[i] = FN(none)();
        for (int j = 0; j < BLOCK; j += 4) {
            int32_t hs, ls;
            memcpy(&hs, high + j, 4);
            memcpy(&ls, low + j, 4);
            for (int r = 0; r < (last_bits ? 2 : 1); r++) {  // bytes of 4 rows side by side
                for (int i = 0; i < 4; i++)
                    v[i] = r ? FN(load)(last + (size_t)(j + i) * bytes, last_bits) : FN(load)(first + (j + i) * 64, 4);
                Bytes a = UNPACK(lo_epi8, v[0], v[1]), b = UNPACK(lo_epi8, v[2], v[3]);
                u[r][0] = UNPACK(lo_epi16, a, b), u[r][1] = UNPACK(hi_epi16, a, b);
                a = UNPACK(hi_epi8, v[0], v[1]), b = UNPACK(hi_epi8, v[2], v[3]);
                u[r][2] = UNPACK(lo_epi16, a, b), u[r][3] = UNPACK(hi_epi16, a, b);
            }
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
                part[1][0] = part[1][1] = FN(none)();
                FN(split)(u[0][i], 4, &part[0][0], &part[0][1]);
                if (last_bits) FN(split)(u[1][i], last_bits, &part[1][0], &part[1][1]);
                for (int s = 0; s < 2; s++) FN(add)(sums + 4 * s + i, lows + 4 * s + i, part[0][s], part[1][s], last_bits, hs, ls);
            }
        }
        for (int i = 0; i < 8; i++) FN(flush)(out + 16 * i, scale + 16 * i, sums[i], lows[i], unit, offset);
    }
}

DEF(void, job)(const Coded *L, int me, int all, int last_bits) {
    static Numbers q;
    int P = L->padded, wide = L->chunks * COLUMNS, from = PART(P / 16, me, all) * 16, to = PART(P / 16, me + 1, all) * 16;
    float *sums = L->scratch, *shifts = sums + 2 * P, *more = shifts + 2 * P, *h = more + 2 * P;
    float *numbers = h + P, *parts = numbers + wide / 2 + 2 * wide, *part = parts + (size_t)me * wide;
    float unit = (float)(1 << last_bits), zero = (float)L->zero;
    if (me == 0) {
        q = (Numbers){(int8_t *)numbers, (int8_t *)(numbers + wide / 4), numbers + wide / 2, numbers + wide / 2 + wide, 0};
        FN(prepare)(L, &q);
    }
    memset(part, 0, (size_t)wide * 4);
    meet(all);
    if (!q.broken) {
        FN(multiply)(L, &q, L->first, 4, from, to, sums, shifts);
        if (last_bits) FN(multiply)(L, &q, L->last, last_bits, from, to, more, NULL);
        for (int n = from; n < to; n++) {
            float g = unit * sums[n] - zero * shifts[n] + (last_bits ? more[n] : 0);
            h[n] = activate(L->act, g) * (unit * sums[n + P] - zero * shifts[n + P] + (last_bits ? more[n + P] : 0));
        }
        for (int n = from; n < to; n += BLOCK) FN(down)(L, n, h + n, last_bits, part);
    }
    meet(all);
    for (int d = PART(L->width, me, all); d < PART(L->width, me + 1, all); d++) {
        float s = q.broken ? NAN : 0;
        for (int t = 0; t < all; t++) s += parts[(size_t)t * wide + d];
        L->out[d] = s;
    }
}

HAS static void FN(coded)(const void *of, int me, int all) {
    int last_bits = ((const Coded *)of)->last_bits;
    if (last_bits == 4) FN(job)(of, me, all, 4);
    else if (last_bits == 2) FN(job)(of, me, all, 2);
    else if (last_bits == 1) FN(job)(of, me, all, 1);
    else FN(job)(of, me, all, 0);
}
