// What is known of the values of one channel, in the card's memory: no step of a chain waits for the host.
#pragma once
#include "common.cuh"

// `scale x + shift`, held between `low` and `high`. NaN stays NaN.
struct Map {
    float scale, shift, low, high;
    __device__ __forceinline__ float of(float x) const {
        float v = __fadd_rn(__fmul_rn(x, scale), shift);
        v = v < low ? low : v;
        return v > high ? high : v;
    }
};

// Values are `map(x)`; their statistics, where something measured them.
struct State {
    Map map;
    float min, max;
    double mean, deviation;
};
