// Memory for floats that begins with a cache line, so that no vector lies across two.
#pragma once

#include <cstdint>
#include <vector>

namespace vision_scan {

class Floats {
 public:
  explicit Floats(int64_t count = 0) {
    assign(count);
  }

  // `count` zeros.
  void assign(int64_t count) {
    memory_.assign(count + kLine, 0.f);
  }

  // At least `count` of any value.
  void reserve(int64_t count) {
    if (static_cast<int64_t>(memory_.size()) < count + kLine) memory_.resize(count + kLine);
  }

  float* data() {
    return memory_.data() + skip();
  }

  const float* data() const {
    return memory_.data() + skip();
  }

 private:
  static constexpr int64_t kLine = 16;

  int64_t skip() const {
    return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(memory_.data()) / sizeof(float) % kLine);
  }

  std::vector<float> memory_;
};

}  // namespace vision_scan
