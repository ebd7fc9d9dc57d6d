// Things that are costly to make, kept for the next call that asks for the same.
#pragma once

#include <cstdint>
#include <iterator>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace glance {

// The last used values, for any thread. A Value has its `request` (comparable), its `bytes`, and
// `kept`: true if it must stay for as long as the cache, within no limit.
template <typename Request, typename Value>
class RecentCache {
 public:
  RecentCache(int64_t most_entries, int64_t most_bytes)
      : most_entries_(most_entries), most_bytes_(most_bytes) {}

  // The value that was made for an equal request, or null.
  std::shared_ptr<const Value> find(const Request& request) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = entries_.begin(); at != entries_.end(); ++at) {
      if ((*at)->request == request) {
        entries_.splice(entries_.begin(), entries_, at);
        return entries_.front();
      }
    }
    return nullptr;
  }

  // Adds a value, of whatever size, and drops those that have not been used for longest. Who still
  // holds one of them keeps it alive.
  void add(std::shared_ptr<const Value> value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_front(std::move(value));
    int64_t count = 0, bytes = 0;
    for (auto at = entries_.begin(); at != entries_.end();) {
      const bool fits = count < most_entries_ && bytes + (*at)->bytes <= most_bytes_;
      if ((*at)->kept) {
        ++at;
      } else if (fits || at == entries_.begin()) {
        count += 1;
        bytes += (*at)->bytes;
        ++at;
      } else {
        at = entries_.erase(at);
      }
    }
  }

 private:
  const int64_t most_entries_, most_bytes_;
  std::mutex mutex_;
  std::list<std::shared_ptr<const Value>> entries_;
};

}  // namespace glance
