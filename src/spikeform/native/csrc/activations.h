// The functions of hierarchically gated neurons, and the rounding that makes a spike code of their output.
//
// Part of a kernel file (see common.h). Polynomials are least-squares fits at Chebyshev points; each function is within
// two units in the last place of fp32 where it is not computed exactly.

// The order of neurons.functions.FUNCTIONS.
enum Function { EXP, RECIPROCAL, SQUARE, INVERSE_SQRT, GELU, GELU_TANH, GELU_QUICK, SILU, RELU, TANH };

template <int N>
SF_INLINE F polynomial(const float (&terms)[N], F x) {
    F y = all(terms[N - 1]);
    for (int i = N - 2; i >= 0; i--) y = fused(y, x, all(terms[i]));
    return y;
}

// e^x = 2^n e^r, |r| <= ln 2 / 2. What would be subnormal is zero.
SF_INLINE F exponential(F x) {
    const float terms[] = {0.50000000135f, 0.16666576872f, 0.04166646468f, 0.00836319738f, 0.00139336762f};
    F bounded = clamp(x, all(-87.3365f), all(89.0f));
    F n = nearest(bounded * 1.44269504089f);
    F r = fused(n, all(2.12194440055e-4f), fused(n, all(-0.693359375f), bounded));  // ln 2 in two parts
    F y = fused(r * r, polynomial(terms, r), r) + 1.0f;
    I power = to_integer(n), half = power >> 1;  // 2^128 is beyond fp32: in two factors
    y = y * (F)((half + 127) << 23) * (F)((power - half + 127) << 23);
    return x < -87.3365f ? F{} : y;
}

SF_INLINE F hyperbolic_tangent(F x) {
    const float terms[] = {-0.33333333178f, 0.13333304278f, -0.05395940591f,
                           0.02176996092f,  -0.0083469805f, 0.00229584127f};
    F size = magnitude(x), square = x * x;
    F near = fused(x * square, polynomial(terms, square), x);
    F far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
    return size < 0.625f ? near : with_sign_of(far, x);
}

// erf(x) = x P(x^2) below 1, else 1 - e^Q(x); it is 1 from 4 on.
SF_INLINE F error_function(F x) {
    const float inner[] = {1.12837916588f,    -0.376126269036f,   0.112835974635f,  -0.0268543287961f,
                           0.00518931194278f, -8.01885499406e-4f, 7.8824971158e-5f};
    const float outer[] = {3.03212973214e-4f, -1.13016667552f,     -0.631937093647f,
                           -0.109978245147f,  0.0263647173736f,    -4.74022234528e-3f,
                           5.92769538584e-4f, -4.55906225328e-5f,  1.61406160734e-6f};
    F size = magnitude(x), bounded = least(size, all(4.0f));
    F near = x * polynomial(inner, x * x);
    F far = 1.0f - exponential(polynomial(outer, bounded));
    return size < 1.0f ? near : with_sign_of(far, x);
}

template <int FUNCTION>
SF_INLINE F apply(F x) {
    if (FUNCTION == EXP) return exponential(x);
    if (FUNCTION == RECIPROCAL) return 1.0f / x;
    if (FUNCTION == SQUARE) return x * x;
    if (FUNCTION == INVERSE_SQRT) return 1.0f / root(x);
    if (FUNCTION == GELU) return x * 0.5f * (1.0f + error_function(x * 0.70710678118f));
    if (FUNCTION == GELU_TANH)
        return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456080f * (x + 0.044715f * (x * x * x))));
    if (FUNCTION == GELU_QUICK) return x * (1.0f / (1.0f + exponential(-1.702f * x)));
    if (FUNCTION == SILU) return x / (1.0f + exponential(-x));
    if (FUNCTION == RELU) return most(x, F{});
    return hyperbolic_tangent(x);
}

// A bank of sub-neurons, one for each binade: rounding the mantissa of an fp32 number to so many bits is its code.
struct Bank {
    float top, silent;
    int32_t half, kept;
};

SF_INLINE Bank bank(const Gates& gates) {
    Bank p;
    p.top = float(std::ldexp(1.0 - std::ldexp(1.0, -int(gates.bits)), int(gates.high)));
    p.silent = float(std::ldexp(1.0 - std::ldexp(1.0, -24), int(gates.low)));
    p.half = gates.nearest ? 1 << (23 - gates.bits) : 0;
    p.kept = -(1 << (24 - gates.bits));
    return p;
}

SF_INLINE F fire(const Bank& p, F y) {
    F value = (F)(((I)clamp(y, all(-p.top), all(p.top)) + p.half) & p.kept);
    return magnitude(value) <= p.silent ? F{} : value;
}

// Runs ``call`` with FUNCTION as a constant.
#define SF_OF_FUNCTION(function, call)                                                       \
    switch (function) {                                                                      \
        case EXP: { constexpr int FUNCTION = EXP; call; break; }                             \
        case RECIPROCAL: { constexpr int FUNCTION = RECIPROCAL; call; break; }               \
        case SQUARE: { constexpr int FUNCTION = SQUARE; call; break; }                       \
        case INVERSE_SQRT: { constexpr int FUNCTION = INVERSE_SQRT; call; break; }           \
        case GELU: { constexpr int FUNCTION = GELU; call; break; }                           \
        case GELU_TANH: { constexpr int FUNCTION = GELU_TANH; call; break; }                 \
        case GELU_QUICK: { constexpr int FUNCTION = GELU_QUICK; call; break; }               \
        case SILU: { constexpr int FUNCTION = SILU; call; break; }                           \
        case RELU: { constexpr int FUNCTION = RELU; call; break; }                           \
        default: { constexpr int FUNCTION = TANH; call; break; }                             \
    }
