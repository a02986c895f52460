// Counts allocations and lets one of them fail. Preloaded, it stands before the C library and the C++ one.
#include <dlfcn.h>
#include <errno.h>

#include <cstdlib>
#include <cstring>
#include <new>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
}

namespace {

// Whose allocations count: those of torch's tensors and of our extension, or the interpreter's.
enum Kind { kOurs, kPython };

thread_local Kind counted = kOurs;
thread_local int seen = 0, fails_at = 0;  // 0: none does

bool is_of(const void* caller, Kind kind) {
  Dl_info found;
  if (!dladdr(caller, &found) || !found.dli_fname) return false;
  const char* const slash = std::strrchr(found.dli_fname, '/');
  const char* const name = slash ? slash + 1 : found.dli_fname;
  const auto starts_with = [name](const char* start) {
    return !std::strncmp(name, start, std::strlen(start));
  };
  return kind == kOurs ? starts_with("_C.abi3") : starts_with("python") || starts_with("libpython");
}

bool is_due(Kind kind) { return fails_at && counted == kind && ++seen == fails_at; }
bool is_due(Kind kind, const void* caller) {
  return fails_at && counted == kind && is_of(caller, kind) && is_due(kind);
}

void* failed() {
  errno = ENOMEM;
  return nullptr;
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))
#define CALLER __builtin_return_address(0)

extern "C" {

// kind: a Kind. number: of the allocation that fails, counted in this thread from now on.
EXPORTED void fail_at(int kind, int number) {
  counted = static_cast<Kind>(kind);
  seen = 0;
  fails_at = number;
}

EXPORTED int allocations() { return seen; }

EXPORTED int posix_memalign(void** out, size_t alignment, size_t size) {
  using Function = int (*)(void**, size_t, size_t);
  static const Function original = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  return is_due(kOurs) ? ENOMEM : original(out, alignment, size);
}

EXPORTED void* malloc(size_t size) { return is_due(kPython, CALLER) ? failed() : __libc_malloc(size); }

EXPORTED void* calloc(size_t n, size_t size) {
  return is_due(kPython, CALLER) ? failed() : __libc_calloc(n, size);
}

EXPORTED void* realloc(void* old, size_t size) {
  return is_due(kPython, CALLER) ? failed() : __libc_realloc(old, size);
}

}  // extern "C"

EXPORTED void* operator new(size_t size) {
  void* const got = is_due(kOurs, CALLER) ? nullptr : __libc_malloc(size ? size : 1);
  if (!got) throw std::bad_alloc();
  return got;
}
