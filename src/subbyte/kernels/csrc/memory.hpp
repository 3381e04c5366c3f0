// Memory for streams of weights and scratch: aligned to cache lines, on huge pages where it pays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace subbyte {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes) : size_(bytes) {
    if (bytes > kMost) throw std::bad_alloc();
    constexpr std::size_t kHuge = std::size_t{2} << 20;
    const std::size_t align = bytes >= kHuge ? kHuge : 64;
    const std::size_t room = (bytes + kSlack + align - 1) / align * align;
    data_ = static_cast<std::uint8_t*>(std::aligned_alloc(align, room));
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    if (align == kHuge) madvise(data_, room, MADV_HUGEPAGE);
#endif
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  std::uint8_t* data() { return data_; }
  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

  // At least this many bytes; what was in it is lost when it grows.
  std::uint8_t* reserve(std::size_t bytes) {
    if (bytes > size_ || !data_) *this = Buffer(bytes + bytes / 4);
    return data_;
  }

 private:
  static constexpr std::size_t kMost = std::size_t{1} << 46;  // more is a mistake in a size
  static constexpr std::size_t kSlack = 64;                   // a vector may be read across the end
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace subbyte
