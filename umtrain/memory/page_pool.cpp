// Memory for torch's tensors on the CPU: the pages of freed buffers move to where they are needed.
//
// As in any allocator a buffer gets the smallest free range that holds it, and freed neighbours
// join. But where none is long enough, and another would grow, a new range of addresses is made of
// several: the kernel moves their pages there (mremap), which costs neither a page fault nor a
// copy. So what is resident of buffers is the most that was ever alive at once, rounded up to units.
// What is smaller than a mebibyte is malloc's.

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace {

constexpr size_t kLeastBytes = size_t{1} << 20;
constexpr size_t kUnit = size_t{512} << 10;
constexpr size_t kAlignment = size_t{2} << 20;  // of new ranges: for huge pages
constexpr size_t kMallocAlignment = 64;         // torch's own

// What one call of mremap can move: pages that came to these addresses together.
struct Piece {
  char* start;
  size_t n_bytes;
};

struct Range {
  char* start = nullptr;
  size_t n_bytes = 0;
  std::vector<Piece> pieces;  // in the order of addresses

  char* end() const { return start + n_bytes; }
};

// Mappings that all ranges are made of; the kernel allows a process some 65000 in all.
size_t n_pieces = 0;
constexpr size_t kMostPieces = 16384;

// Takes the last n_bytes off `range`.
Range cut(Range& range, size_t n_bytes) {
  range.n_bytes -= n_bytes;
  Range tail{range.end(), n_bytes, {}};
  while (!range.pieces.empty() && range.pieces.back().start >= tail.start) {
    tail.pieces.push_back(range.pieces.back());
    range.pieces.pop_back();
  }
  if (!range.pieces.empty()) {
    Piece& last = range.pieces.back();
    char* last_end = last.start + last.n_bytes;
    if (last_end > tail.start) {
      tail.pieces.push_back({tail.start, static_cast<size_t>(last_end - tail.start)});
      last.n_bytes = tail.start - last.start;
      ++n_pieces;
    }
  }
  std::reverse(tail.pieces.begin(), tail.pieces.end());
  return tail;
}

// Free ranges, of which no two touch.
class Pool {
 public:
  void add(Range range) {
    auto after = by_start_.upper_bound(range.start);
    if (after != by_start_.end() && range.end() == after->second.start) join(range, pop(after));
    auto before = by_start_.lower_bound(range.start);
    if (before != by_start_.begin() && (--before)->second.end() == range.start) {
      Range joined = pop(before);
      join(joined, std::move(range));
      range = std::move(joined);
    }
    const std::pair<size_t, char*> size{range.n_bytes, range.start};
    by_size_.insert(size);
    try {
      by_start_.emplace(size.second, std::move(range));
    } catch (...) {
      by_size_.erase(size);
      throw;
    }
    n_bytes_ += size.first;
  }

  // Takes n_bytes in a row off the smallest range that has them; an empty range if none has.
  Range take_in_a_row(size_t n_bytes) {
    auto found = by_size_.lower_bound({n_bytes, nullptr});
    if (found == by_size_.end()) return {};
    Range range = pop(by_start_.find(found->second));
    if (range.n_bytes > n_bytes) add(cut(range, range.n_bytes - n_bytes));
    return range;
  }

  // Takes up to n_bytes off the largest range.
  Range take_of_largest(size_t n_bytes) {
    Range range = pop(by_start_.find(std::prev(by_size_.end())->second));
    if (range.n_bytes <= n_bytes) return range;
    Range tail = cut(range, n_bytes);
    add(std::move(range));
    return tail;
  }

  bool empty() const { return by_start_.empty(); }
  size_t n_bytes() const { return n_bytes_; }

 private:
  using Starts = std::map<char*, Range>;

  static void join(Range& range, Range next) {
    range.n_bytes += next.n_bytes;
    range.pieces.insert(range.pieces.end(), next.pieces.begin(), next.pieces.end());
  }

  Range pop(Starts::iterator found) {
    Range range = std::move(found->second);
    by_size_.erase({range.n_bytes, range.start});
    by_start_.erase(found);
    n_bytes_ -= range.n_bytes;
    return range;
  }

  Starts by_start_;
  std::set<std::pair<size_t, char*>> by_size_;
  size_t n_bytes_ = 0;
};

// Never destroyed: Python frees its last tensors after C++ has destroyed what is static.
std::mutex& mutex = *new std::mutex;
Pool& pool = *new Pool;
std::unordered_map<void*, Range>& alive = *new std::unordered_map<void*, Range>;
size_t alive_bytes = 0;
size_t fresh_bytes = 0;              // that the kernel was asked for so far
size_t moved_bytes = 0;              // that it moved so far
size_t kept_up_to_bytes = SIZE_MAX;  // larger buffers go back to the kernel when freed

void unmap(char* start, size_t n_bytes) {
  if (n_bytes == 0 || munmap(start, n_bytes) == 0) return;
  madvise(start, n_bytes, MADV_DONTNEED);  // one mapping too many: without its pages, at least
}

void unmap(const Range& range) {
  unmap(range.start, range.n_bytes);
  n_pieces -= range.pieces.size();
}

void give_back_all() {
  while (!pool.empty()) unmap(pool.take_of_largest(SIZE_MAX));
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

// Has reserved addresses hold memory. Not by mapping over them: RLIMIT_DATA would not count that.
bool make_fresh(char* start, size_t n_bytes) {
  if (mprotect(start, n_bytes, PROT_READ | PROT_WRITE) != 0) return false;
  madvise(start, n_bytes, MADV_HUGEPAGE);  // a kernel without them has small ones
  fresh_bytes += n_bytes;
  ++n_pieces;
  return true;
}

// Moves pages of `source` to the end of `range`; what cannot be moved goes back to the kernel.
bool move(const Range& source, Range& range) {
  for (size_t i = 0; i < source.pieces.size(); ++i) {
    const Piece& piece = source.pieces[i];
    const int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
    if (mremap(piece.start, piece.n_bytes, piece.n_bytes, flags, range.end()) == MAP_FAILED) {
      unmap(piece.start, source.end() - piece.start);
      n_pieces -= source.pieces.size() - i;
      return false;
    }
    range.pieces.push_back({range.end(), piece.n_bytes});
    range.n_bytes += piece.n_bytes;
    moved_bytes += piece.n_bytes;
  }
  return true;
}

Range take_fresh(size_t n_bytes) {
  char* start = reserve(n_bytes);
  if (start == nullptr) return {};
  if (!make_fresh(start, n_bytes)) {
    unmap(start, n_bytes);
    return {};
  }
  return {start, n_bytes, {{start, n_bytes}}};
}

// Returns an empty range if addresses or memory are lacking, or if pages did not move.
Range take_composed(size_t n_bytes) {
  char* start = reserve(n_bytes);
  if (start == nullptr) return {};
  Range range{start, 0, {}};
  while (range.n_bytes < n_bytes && !pool.empty()) {
    if (move(pool.take_of_largest(n_bytes - range.n_bytes), range)) continue;
    // The kernel may have unmapped where it was to move to: whose that is now, is not known.
    if (range.n_bytes > 0) pool.add(std::move(range));
    return {};
  }
  const Piece rest{range.end(), n_bytes - range.n_bytes};
  if (rest.n_bytes == 0) return range;
  if (!make_fresh(rest.start, rest.n_bytes)) {
    unmap(rest.start, rest.n_bytes);
    if (range.n_bytes > 0) pool.add(std::move(range));
    return {};
  }
  range.n_bytes = n_bytes;
  range.pieces.push_back(rest);
  return range;
}

// Returns an empty range if there is no memory.
Range take(size_t n_bytes) {
  n_bytes = (n_bytes + kUnit - 1) / kUnit * kUnit;
  Range range = pool.take_in_a_row(n_bytes);
  if (range.start == nullptr && n_pieces < kMostPieces) range = take_composed(n_bytes);
  if (range.start != nullptr) return range;
  give_back_all();
  return take_fresh(n_bytes);
}

void* take_buffer(size_t n_bytes) {
  const std::lock_guard<std::mutex> guard(mutex);
  Range range = take(n_bytes);
  if (range.start == nullptr) return nullptr;
  void* start = range.start;
  const size_t taken_bytes = range.n_bytes;
  alive.emplace(start, std::move(range));
  alive_bytes += taken_bytes;
  return start;
}

bool free_buffer(void* start) {
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = alive.find(start);
  if (found == alive.end()) return false;
  Range range = std::move(found->second);
  alive.erase(found);
  alive_bytes -= range.n_bytes;
  const size_t n_bytes = range.n_bytes;
  if (n_bytes > kept_up_to_bytes) {
    unmap(range);
    return true;
  }
  try {
    pool.add(std::move(range));
  } catch (const std::bad_alloc&) {  // not even a node of the pool: the limit is reached
    unmap(static_cast<char*>(start), n_bytes);
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
  if (start != nullptr) c10::profiledCPUMemoryReporter().Delete(start);
  const bool is_aligned = reinterpret_cast<uintptr_t>(start) % kUnit == 0;
  if (start != nullptr && !(is_aligned && free_buffer(start))) free(start);
}

struct PagePool final : c10::Allocator {
  c10::DataPtr allocate(size_t n_bytes) override {
    void* start = nullptr;
    if (n_bytes > 0) {
      start = n_bytes >= kLeastBytes ? take_buffer(n_bytes) : malloc_aligned(n_bytes);
      TORCH_CHECK(start != nullptr, "can't allocate memory: you tried to allocate ", n_bytes,
                  " bytes");
      c10::profiledCPUMemoryReporter().New(start, n_bytes);
    }
    return {start, start, &free_any, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_any; }
  void copy_data(void* target, const void* source, size_t n_bytes) const override {
    default_copy_data(target, source, n_bytes);
  }
};

PagePool& page_pool = *new PagePool;

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
  static bool is_installed = false;
  if (is_installed) return;
  is_installed = true;
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
  counts[1] = pool.n_bytes();
  counts[2] = fresh_bytes;
  counts[3] = moved_bytes;
}
}
