// Memory for torch's tensors on the CPU: the pages of freed buffers move to the next buffer.
//
// glibc's heap hands addresses out again, so a hole serves what fits in it; here it is pages, and
// those fit anywhere: a new buffer is a new range of addresses, to which the kernel moves pages of
// freed ones (mremap), which costs neither a page fault nor a copy. What is resident is the most
// that was ever alive at once, rounded up to units, and no more.
//
// Buffers come in two sizes with a pool of free ranges each: units of 2 MiB, huge pages where the
// kernel has them, and units of 64 KiB. A pool that has too little gets fresh pages, and gives as
// many of the other's back first. What is smaller than a mebibyte is malloc's.

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <c10/core/Allocator.h>

namespace {

constexpr size_t kLeastBytes = size_t{1} << 20;
constexpr size_t kLargeBytes = size_t{4} << 20;
constexpr size_t kSmallUnit = size_t{64} << 10;
constexpr size_t kLargeUnit = size_t{2} << 20;
constexpr size_t kAlignment = size_t{2} << 20;  // moves whole page tables, and holds huge pages
constexpr size_t kMallocAlignment = 64;         // torch's own

// What one call of mremap can move: pages that came here together.
struct Piece {
  char* start;
  size_t n_bytes;
};

struct Range {
  char* start = nullptr;
  size_t n_bytes = 0;
  std::vector<Piece> pieces;
};

struct Pool {
  size_t unit;
  std::list<Range> freed;  // the oldest first
  size_t freed_bytes = 0;
};

std::mutex mutex;
Pool small_pool{kSmallUnit, {}, 0};
Pool large_pool{kLargeUnit, {}, 0};
std::unordered_map<void*, Range> alive;
size_t alive_bytes = 0;
size_t fresh_bytes = 0;            // that the kernel was asked for so far
size_t kept_up_to_bytes = SIZE_MAX;  // larger buffers go back to the kernel when freed

Pool& pool_of(size_t n_bytes) { return n_bytes >= kLargeBytes ? large_pool : small_pool; }

void unmap(char* start, size_t n_bytes) {
  if (n_bytes > 0) munmap(start, n_bytes);
}

// Takes up to n_bytes off the end of the oldest freed range's last piece; the pool is not empty.
Piece take_oldest(Pool& pool, size_t n_bytes) {
  Range& range = pool.freed.front();
  Piece& last = range.pieces.back();
  const size_t taken = std::min(last.n_bytes, n_bytes);
  last.n_bytes -= taken;
  range.n_bytes -= taken;
  pool.freed_bytes -= taken;
  const Piece piece{last.start + last.n_bytes, taken};
  if (last.n_bytes == 0) range.pieces.pop_back();
  if (range.pieces.empty()) pool.freed.pop_front();
  return piece;
}

void give_back(Pool& pool, size_t n_bytes) {
  size_t left = (n_bytes + pool.unit - 1) / pool.unit * pool.unit;
  while (left > 0 && !pool.freed.empty()) {
    const Piece piece = take_oldest(pool, left);
    unmap(piece.start, piece.n_bytes);
    left -= piece.n_bytes;
  }
}

void give_back_all() {
  give_back(small_pool, small_pool.freed_bytes);
  give_back(large_pool, large_pool.freed_bytes);
}

// Addresses alone: no memory, none of what limits count.
char* reserve(size_t n_bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* found = mmap(nullptr, n_bytes + kAlignment, PROT_NONE, flags, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(found);
  const size_t lead = -reinterpret_cast<uintptr_t>(start) % kAlignment;
  unmap(start, lead);
  unmap(start + lead + n_bytes, kAlignment - lead);
  return start + lead;
}

bool map_fresh(char* start, size_t n_bytes, bool is_large) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  if (mmap(start, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return false;
  if (is_large) madvise(start, n_bytes, MADV_HUGEPAGE);  // a kernel without them has small ones
  fresh_bytes += n_bytes;
  return true;
}

// Returns an empty range if there is no memory.
Range take(size_t n_bytes) {
  Pool& pool = pool_of(n_bytes);
  Pool& other = &pool == &large_pool ? small_pool : large_pool;
  n_bytes = (n_bytes + pool.unit - 1) / pool.unit * pool.unit;
  for (auto range = pool.freed.rbegin(); range != pool.freed.rend(); ++range) {
    if (range->n_bytes == n_bytes) {
      Range found = std::move(*range);
      pool.freed.erase(std::next(range).base());
      pool.freed_bytes -= n_bytes;
      return found;
    }
  }
  char* start = reserve(n_bytes);
  if (start == nullptr) return {};
  Range range{start, n_bytes, {}};
  size_t filled = 0;
  while (filled < n_bytes && !pool.freed.empty()) {
    const Piece piece = take_oldest(pool, n_bytes - filled);
    char* target = start + filled;
    const int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
    if (mremap(piece.start, piece.n_bytes, piece.n_bytes, flags, target) == MAP_FAILED) {
      unmap(piece.start, piece.n_bytes);  // too many mappings, say: fresh pages do as well
      break;
    }
    range.pieces.push_back({target, piece.n_bytes});
    filled += piece.n_bytes;
  }
  if (filled == n_bytes) return range;
  give_back(other, n_bytes - filled);
  const Piece rest{start + filled, n_bytes - filled};
  const bool is_large = &pool == &large_pool;
  if (!map_fresh(rest.start, rest.n_bytes, is_large)) {
    give_back_all();
    if (!map_fresh(rest.start, rest.n_bytes, is_large)) {
      unmap(start, n_bytes);
      return {};
    }
  }
  range.pieces.push_back(rest);
  return range;
}

void* take_buffer(size_t n_bytes) {
  const std::lock_guard<std::mutex> guard(mutex);
  Range range = take(n_bytes);
  void* start = range.start;
  if (start != nullptr) {
    alive_bytes += range.n_bytes;
    alive.emplace(start, std::move(range));
  }
  return start;
}

bool free_buffer(void* start) {
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = alive.find(start);
  if (found == alive.end()) return false;
  Range range = std::move(found->second);
  alive.erase(found);
  alive_bytes -= range.n_bytes;
  if (range.n_bytes > kept_up_to_bytes) {
    unmap(range.start, range.n_bytes);
  } else {
    Pool& pool = pool_of(range.n_bytes);
    pool.freed_bytes += range.n_bytes;
    pool.freed.push_back(std::move(range));
  }
  return true;
}

void* malloc_aligned(size_t n_bytes) {
  void* start = nullptr;
  if (posix_memalign(&start, kMallocAlignment, n_bytes) == 0) return start;
  {
    const std::lock_guard<std::mutex> guard(mutex);
    give_back_all();
  }
  return posix_memalign(&start, kMallocAlignment, n_bytes) == 0 ? start : nullptr;
}

void free_any(void* start) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(start) % kAlignment == 0;
  if (start != nullptr && !(is_aligned && free_buffer(start))) free(start);
}

struct PagePool final : c10::Allocator {
  c10::DataPtr allocate(size_t n_bytes) override {
    void* start = nullptr;
    if (n_bytes > 0) {
      start = n_bytes >= kLeastBytes ? take_buffer(n_bytes) : malloc_aligned(n_bytes);
      TORCH_CHECK(start != nullptr, "can't allocate memory: you tried to allocate ", n_bytes,
                  " bytes");
    }
    return {start, start, &free_any, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_any; }
  void copy_data(void* target, const void* source, size_t n_bytes) const override {
    default_copy_data(target, source, n_bytes);
  }
};

PagePool page_pool;

void before_fork() { mutex.lock(); }
void after_fork() { mutex.unlock(); }
void after_fork_in_child() {
  give_back_all();  // pages shared with the parent would be copied when written to
  mutex.unlock();
}

}  // namespace

extern "C" {

// Has torch take its CPU buffers from here, from now on; those it has stay where they are.
void umtrain_install() {
  pthread_atfork(before_fork, after_fork, after_fork_in_child);
  c10::SetAllocator(c10::DeviceType::CPU, &page_pool, 255);
}

// Buffers of more than n_bytes go back to the kernel when freed, from now on.
void umtrain_keep_up_to(size_t n_bytes) {
  const std::lock_guard<std::mutex> guard(mutex);
  kept_up_to_bytes = n_bytes;
}

void umtrain_give_back() {
  const std::lock_guard<std::mutex> guard(mutex);
  give_back_all();
}

void umtrain_counts(size_t* counts) {
  const std::lock_guard<std::mutex> guard(mutex);
  counts[0] = alive_bytes;
  counts[1] = small_pool.freed_bytes + large_pool.freed_bytes;
  counts[2] = fresh_bytes;
}
}
