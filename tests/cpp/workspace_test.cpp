// csrc/common/workspace.h: memory is found again by the thread that gave it back, and not hoarded.
#include "common/workspace.h"

#include <thread>

#include "check.h"

using glance::Workspace;
using glance::WorkspacePool;

namespace {

int64_t kept() { return WorkspacePool::of_thread().kept_bytes(); }

void is_found_again() {
  float* first;
  {
    const Workspace<float> some(1000);
    first = some.data();
    EXPECT(kept() == 0);
  }
  EXPECT(kept() == 4000);
  const Workspace<float> smaller(900), other(10);
  EXPECT(smaller.data() == first);
  EXPECT(other.data() != first);
  EXPECT(reinterpret_cast<uintptr_t>(other.data()) % 64 == 0);
}

void the_smallest_that_serves_is_taken() {
  double* small;
  {
    const Workspace<double> large(4000), little(500);
    small = little.data();
  }
  const Workspace<double> some(400);
  EXPECT(some.data() == small);
}

void no_more_is_kept_than_allowed() {
  for (int i = 0; i < 3; ++i) {
    const Workspace<char> a(WorkspacePool::kMostBytes / 2), b(WorkspacePool::kMostBytes / 2 + i);
  }
  EXPECT(kept() <= WorkspacePool::kMostBytes);
  {
    const Workspace<char> huge(WorkspacePool::kMostBytes + 1);
  }
  EXPECT(kept() <= WorkspacePool::kMostBytes);
}

void nothing_and_something() {
  const Workspace<int> empty(0), some(5);
  EXPECT(empty.data() == nullptr);
  EXPECT(some.size() == 5);
  some[4] = 3;
  EXPECT(some.data()[4] == 3);
}

void every_thread_has_its_own() {
  {
    const Workspace<float> mine(64);
  }
  int64_t theirs = -1;
  std::thread([&] { theirs = kept(); }).join();
  EXPECT(theirs == 0);
}

}  // namespace

int main() {
  is_found_again();
  the_smallest_that_serves_is_taken();
  no_more_is_kept_than_allowed();
  nothing_and_something();
  every_thread_has_its_own();
  return glance_test::finish("workspace");
}
