// A multi-threshold population, a vector of inputs at a time: the codes of encode.h, and what they are worth.
//
// Part of a kernel file (see common.h).

static Oat population(const Population& p) { return oat(p.threshold, p.count, p.limit, p.resolution, p.rounding); }

// Codes of the inputs v, whole numbers; ``unit`` is that of each lane's sub-neuron.
SF_INLINE F oat_code(const Oat& p, F v, F* unit) {
    *unit = magnitude(v) >= p.normal ? all(p.unit[1]) : all(p.unit[0]);
    const F scaled = v / *unit, limit = all(p.limit);
    if (p.rounding == NEAREST) return nearest(clamp(scaled, -limit, limit));
    if (p.rounding == FLOOR) return whole(clamp(scaled, -limit, limit));
    const F size = least(magnitude(scaled), limit + 1.0f), below = whole(size);  // strict: a multiple k sends k - 1
    return with_sign_of(most(below < size ? below : below - 1.0f, F{}), v);
}

// decode(encode(v)).
SF_INLINE F oat_value(const Oat& p, F v) {
    F unit;
    const F code = oat_code(p, v, &unit);
    return code * unit;
}
