// `cosine_similarity` of cosine.py, for one token of one head.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

inline float sum_of(Vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

inline float product(const float* a, const float* b, Index d) {
    Vec sum = {};
    for (Index c = 0; c < d; c += LANES) sum += load(a + c) * load(b + c);
    return sum_of(sum);
}

// The token is normalized to the length norm, then its channels c and pairs + c are rotated by an angle.
// Channels: d, a multiple of LANES.
struct Cosine {
    float norm;
    const float *cos, *sin;  // (pairs)
    Index pairs, d;

    void apply(const float* token, float* __restrict to) const {
        const float factor = norm * inverse_length(token);
        for (Index c = 0; c < d; c += LANES) store(to + c, load(token + c) * factor);
        rotate(to, 1);
    }

    // The gradient of what `apply` made becomes that of the token, in place; returns the token's share in that of norm.
    float go_back(const float* token, float* __restrict gradient) const {
        rotate(gradient, -1);
        const float inverse = inverse_length(token), share = inverse * product(token, gradient, d);
        for (Index c = 0; c < d; c += LANES)
            store(gradient + c, norm * inverse * (load(gradient + c) - load(token + c) * (inverse * share)));
        return share;
    }

  private:
    float inverse_length(const float* token) const { return 1 / std::sqrt(product(token, token, d) + 1e-6f); }

    void rotate(float* token, float sign) const {
        float *__restrict first = token, *__restrict second = token + pairs;
        for (Index c = 0; c < pairs; c++) {
            const float a = first[c], b = second[c], s = sign * sin[c];
            first[c] = a * cos[c] - b * s;
            second[c] = b * cos[c] + a * s;
        }
    }
};

}  // namespace
