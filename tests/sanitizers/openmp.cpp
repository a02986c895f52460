// Tells ThreadSanitizer what OpenMP's teams wait for: libgomp, which torch's thread pool is made of, is not
// built for it. Preloaded, this stands before libgomp.
#include <dlfcn.h>

extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);

using Body = void (*)(void*);

struct Region {
  Body body;
  void* data;
  char begin, end;  // addresses that stand for the fork and the join
};

static void run(void* given) {
  Region* const region = static_cast<Region*>(given);
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

__attribute__((visibility("default"))) void GOMP_parallel(Body body, void* data, unsigned threads,
                                                          unsigned flags) {
  using Parallel = void (*)(Body, void*, unsigned, unsigned);
  static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{body, data, 0, 0};
  __tsan_release(&region.begin);
  parallel(&run, &region, threads, flags);
  __tsan_acquire(&region.end);
}
}
