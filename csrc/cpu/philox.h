// Philox4x32-10 (Salmon et al., SC 2011), the same bits as metareward_kernels/random_keys.py.
#pragma once

#include <array>
#include <cstdint>

namespace metareward {

inline std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c[2];
    c = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1, uint32_t(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// 53 bits in (0,1): zero becomes half a step, every other value is exact.
inline double keyed_uniform(uint64_t key, uint64_t position) {
  const auto words =
      philox4x32_10({uint32_t(position), uint32_t(position >> 32), 0, 0}, uint32_t(key), uint32_t(key >> 32));
  const uint64_t bits = (uint64_t{words[0]} << 21) | (words[1] >> 11);
  return (bits == 0 ? 0.5 : double(bits)) * 0x1p-53;
}

}  // namespace metareward
