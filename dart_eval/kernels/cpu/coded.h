// Coded weights, as kernels.c describes them: the FFN of dart-plus, and of rounding. Read twice, as vectors.h is.

HAS static void FN(prepare)(const Coded *L, Numbers *q) {  // x as whole numbers
    float squares = 0;
    for (int c = 0; c < L->chunks && !q->broken; c++) {
        int from = c * COLUMNS, n = L->width - from < COLUMNS ? L->width - from : COLUMNS, sum = 0;
        float x[COLUMNS] = {0}, most = 0;
        memcpy(x, L->x + from, (size_t)n * 4);
        for (int d = 0; d < COLUMNS; d++) {
            most = fabsf(x[d]) > most ? fabsf(x[d]) : most;
            q->broken |= !(fabsf(x[d]) <= FLT_MAX);
            squares += x[d] * x[d];
        }
        float inverse = most > 1e-30f && !q->broken ? 16256.f / most : 0.f;
        for (int d = 0; d < COLUMNS; d++) {
            int v = inverse ? WHOLE(x[d] * inverse) : 0;
            q->high[from + d] = (int8_t)((v + 64) >> 7);
            q->low[from + d] = (int8_t)(v - 128 * q->high[from + d]);
            sum += v;
        }
        q->scale[c] = most / 16256.f;
        q->sum[c] = (float)sum;
    }
    q->norm = sqrtf(squares);
}

// [2][padded], of gate and up: sums of scale * x * bits, and of scale * x. planes: of `bits` bits, four neurons by turns
DEF(void, look)(const Coded *L, const Numbers *q, const uint8_t *planes, int bits, int from, int to, float *seen, float *shift) {
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
            seen[i % 2 * L->padded + n + i / 2] = FN(sum)(f[i]);
            if (shift) shift[i % 2 * L->padded + n + i / 2] = each[i];
        }
    }
}

// What first bits promise: scores for exact reading, scores for writing as seen, and h as seen
DEF(void, scores)(const Coded *L, int act, float norm, int from, int to, const float *restrict seen,
                  const float *restrict shift, float *restrict score, float *restrict rough, float *restrict h) {
    int P = L->padded;
    const float *line = L->line, *doubts = L->doubts;
    for (int n = from; n < to; n++) {
        float g = line[0] * seen[n] + line[1] * shift[n], u = line[2] * seen[n + P] + line[3] * shift[n + P];
        float og = norm * doubts[n], ou = norm * doubts[n + P], a = activate(act, g + og), b = activate(act, g - og);
        float expected = (a * a + b * b) / 2 * (u * u + ou * ou), left;
        h[n] = activate(act, g) * u;
        left = expected - (1 - L->known) * h[n] * h[n];
        left = (left < 0 ? 0 : left) * L->columns[n], expected *= L->columns[n];
        score[n] = left <= FLT_MAX ? left > 0 ? left : 0 : INFINITY;  // no -0; what is no number counts as the largest
        rough[n] = expected <= FLT_MAX ? expected > 0 ? expected : 0 : INFINITY;
    }
    for (int n = from > L->neurons ? from : L->neurons; n < to; n++) score[n] = rough[n] = from_bits(~0u);
}

// The k largest scores, ties to the lower index: the bits of numbers >= 0 are ordered as they are, and what may not be
// taken is negative. Those taken may not be taken of `beside`. Returns how many there are: k, where there are so many
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
HAS static int FN(choose)(const float *scores, int n, int k, int32_t *chosen, float *beside) {
    const int32_t *v = (const int32_t *)scores;
    int ties, count = 0;
    int32_t low = FN(least)(v, n, k, &ties);
    for (int i = 0; i < n && k > 0; i++) {
        int tie = (v[i] == low) & (ties > 0), take = (v[i] > low) | tie;
        chosen[count] = i;
        count += take;
        ties -= tie;
        if (beside) ((int32_t *)beside)[i] |= -take;
    }
    return count;
}

// out += rows of down of m neurons, at most BLOCK and of one group, times h. seen: as first bits show them. after: so many
// of the following neurons are fetched meanwhile, what is read of them first
DEF(void, down)(const Coded *L, const int32_t *index, const float *h, int m, int rest, int seen, float *out, int after) {
    size_t by = (size_t)L->turns, more = (size_t)rest * 16, chunks = (size_t)L->chunks, ahead = chunks * (seen ? 64 : 2 * more);
    const uint8_t *first[BLOCK], *next[BLOCK];
    int8_t high[BLOCK], low[BLOCK];
    float most = 0;
    int sum = 0, broken = 0, m4 = (m + 3) / 4 * 4;
    for (int i = 0; i < m; i++) {
        most = fabsf(h[i]) > most ? fabsf(h[i]) : most;
        broken |= !(fabsf(h[i]) <= FLT_MAX);
    }
    for (int i = 0; i < m4; i++) {
        size_t n = (size_t)index[i < m ? i : 0];
        first[i] = L->dfirst + n / by * by * chunks * 64 + n % by * 64;
        next[i] = L->dnext + n / by * by * chunks * more + n % by * more;
        int v = i < m && most > 1e-30f && !broken ? WHOLE(h[i] * (16256.f / most)) : 0;
        high[i] = (int8_t)((v + 64) >> 7);
        low[i] = (int8_t)(v - 128 * high[i]);
        sum += v;
    }
    float unit = broken ? NAN : most / 16256.f, offset = (seen ? L->line[5] : -(float)L->half) * unit * (float)sum;
    const uint16_t *scale = L->dscales + (L->group ? (size_t)(index[0] / L->group) * chunks * COLUMNS : 0);
    for (int c = 0; c < L->chunks; c++, out += COLUMNS, scale += COLUMNS) {
        for (int i = PART(after, c, L->chunks); i < PART(after, c + 1, L->chunks); i++)
            for (size_t d = 0; d < ahead; d += 64) PREFETCH((seen ? L->dfirst : L->next) + (size_t)index[m + i] * ahead + d);
        Bytes sums[8], lows[8], v[4], u[2][4], part[2][2];
        for (int i = 0; i < 8; i++) sums[i] = lows[i] = FN(none)();
        for (int j = 0; j < m4; j += 4) {
            int32_t hs, ls;
            memcpy(&hs, high + j, 4);
            memcpy(&ls, low + j, 4);
            for (int r = 0; r < (rest ? 2 : 1); r++) {  // bytes of 4 rows side by side
                for (int i = 0; i < 4; i++)
                    v[i] = r ? FN(load)(next[j + i] + c * by * more, rest) : FN(load)(first[j + i] + c * by * 64, 4);
                Bytes a = UNPACK(lo_epi8, v[0], v[1]), b = UNPACK(lo_epi8, v[2], v[3]);
                u[r][0] = UNPACK(lo_epi16, a, b), u[r][1] = UNPACK(hi_epi16, a, b);
                a = UNPACK(hi_epi8, v[0], v[1]), b = UNPACK(hi_epi8, v[2], v[3]);
                u[r][2] = UNPACK(lo_epi16, a, b), u[r][3] = UNPACK(hi_epi16, a, b);
            }
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
                part[1][0] = part[1][1] = FN(none)();
                FN(split)(u[0][i], 4, &part[0][0], &part[0][1]);
                if (rest) FN(split)(u[1][i], rest, &part[1][0], &part[1][1]);
                for (int s = 0; s < 2; s++) FN(add)(sums + 4 * s + i, lows + 4 * s + i, part[0][s], part[1][s], rest, hs, ls);
            }
        }
        for (int i = 0; i < 8; i++)
            FN(flush)(out + 16 * i, scale + 16 * i, sums[i], lows[i], seen ? L->line[4] * unit : unit, offset);
    }
}

DEF(int, block)(const int32_t *index, int n, int group) {  // how many of the next neurons go together
    int same = 1;
    while (same < n && (!group || index[same] / group == index[0] / group)) same++;
    int blocks = (same + BLOCK - 1) / BLOCK, m = ((same + blocks - 1) / blocks + 3) / 4 * 4;
    return m < same ? m : same;
}

// h of m neurons with all of their bits: the others add to what was seen. Their rows of down are fetched meanwhile
DEF(void, exactly)(const Coded *L, const Numbers *q, const int32_t *index, int m, int rest, const float *seen,
                   const float *shift, float *h) {
    float gate[BLOCK] = {0}, up[BLOCK] = {0}, one = (float)(1 << rest), half = (float)L->half;
    for (int i = 0; i < m; i++) {
        size_t n = (size_t)index[i], line = (size_t)L->chunks * 16;
        const uint16_t *scale = L->scales + n / 4 * 8 * (L->step ? line / 16 : 1) + n % 4 * 2;
        const uint8_t *p = L->next + n * line * 2 * rest, *first = L->dfirst + n * line * 4, *next = L->dnext + n * line * rest;
        Floats g = F(setzero_ps)(), u = g;
        for (int c = 0; c < L->chunks; c++, p += 32 * rest, scale += L->step) {
            int32_t two;
            memcpy(&two, scale, 4);
            __m128 s = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(two)), _mm_set1_ps(q->scale[c]));
            const int8_t *x = q->high + c * COLUMNS, *y = q->low + c * COLUMNS;
            PREFETCH(first + c * 64);
            PREFETCH(next + c * 16 * rest);
            g = F(fmadd_ps)(FN(dots)(p, rest, x, y), F(set1_ps)(_mm_cvtss_f32(s)), g);
            u = F(fmadd_ps)(FN(dots)(p + 16 * rest, rest, x, y), F(set1_ps)(_mm_cvtss_f32(_mm_movehdup_ps(s))), u);
        }
        gate[i] = FN(sum)(g) + one * seen[n] - half * shift[n];
        up[i] = FN(sum)(u) + one * seen[n + L->padded] - half * shift[n + L->padded];
    }
    for (int i = 0; i < BLOCK; i++) h[i] = activate(L->act, gate[i]) * up[i];
}

DEF(void, job)(const Coded *L, int me, int all, int rest) {
    static Numbers q;
    static int count[2];
    int P = L->padded, wide = L->chunks * COLUMNS, from = PART(P / 16, me, all) * 16, to = PART(P / 16, me + 1, all) * 16;
    float *seen = L->scratch, *shift = seen + 2 * P, *score = shift + 2 * P, *rough = score + P, *shown = rough + P;
    float *numbers = shown + P, *parts = numbers + wide / 2 + 2 * wide, *part = parts + (size_t)me * wide, h[BLOCK];
    float one = (float)(1 << rest), half = (float)L->half, *more = score;  // [2][padded]
    if (me == 0) {
        q = (Numbers){(int8_t *)numbers, (int8_t *)(numbers + wide / 4), numbers + wide / 2, numbers + wide / 2 + wide, 0, 0};
        FN(prepare)(L, &q);
    }
    memset(part, 0, (size_t)wide * 4);
    meet(all);
    if (!q.broken) FN(look)(L, &q, L->first, 4, from, to, seen, shift);
    if (!q.broken && !L->graded) {
        if (rest) FN(look)(L, &q, L->next, rest, from, to, more, NULL);
        for (int n = from; n < to; n++) {
            float g = one * seen[n] - half * shift[n] + (rest ? more[n] : 0);
            shown[n] = activate(L->act, g) * (one * seen[n + P] - half * shift[n + P] + (rest ? more[n + P] : 0));
        }
        for (int32_t n = from, index[16]; n < to; n += 16) {
            for (int i = 0; i < 16; i++) index[i] = n + i;
            FN(down)(L, index, shown + n, 16, rest, 0, part, 0);
        }
    } else if (!q.broken) {
        if (L->act == 0) FN(scores)(L, 0, q.norm, from, to, seen, shift, score, rough, shown);
        else if (L->act == 1) FN(scores)(L, 1, q.norm, from, to, seen, shift, score, rough, shown);
        else if (L->act == 2) FN(scores)(L, 2, q.norm, from, to, seen, shift, score, rough, shown);
        else FN(scores)(L, 3, q.norm, from, to, seen, shift, score, rough, shown);
        meet(all);
        if (me == 0) {
            count[0] = FN(choose)(score, P, L->taken, L->chosen, rough);
            count[1] = FN(choose)(rough, P, L->coarse, L->chosen + P, NULL);
        }
        meet(all);
        for (int r = 0; r < 2; r++) {
            const int32_t *index = L->chosen + r * P + PART(count[r], me, all), *end = L->chosen + r * P + PART(count[r], me + 1, all);
            for (int m; index < end; index += m) {
                m = FN(block)(index, (int)(end - index), L->group);
                int after = end - index - m < BLOCK ? (int)(end - index - m) : BLOCK;
                for (int i = 0; r && i < m; i++) h[i] = shown[index[i]];
                if (!r) FN(exactly)(L, &q, index, m, rest, seen, shift, h);
                if (r) FN(down)(L, index, h, m, 0, 1, part, after);
                else FN(down)(L, index, h, m, rest, 0, part, after);
            }
        }
    }
    meet(all);
    for (int d = PART(L->width, me, all); d < PART(L->width, me + 1, all); d++) {
        float s = q.broken ? NAN : 0;
        for (int t = 0; t < all; t++) s += parts[(size_t)t * wide + d];
        L->out[d] = s;
    }
}

HAS static void FN(coded)(const void *of, int me, int all) {
    int rest = ((const Coded *)of)->rest;
    if (rest == 4) FN(job)(of, me, all, 4);
    else if (rest == 2) FN(job)(of, me, all, 2);
    else if (rest == 1) FN(job)(of, me, all, 1);
    else FN(job)(of, me, all, 0);
}
