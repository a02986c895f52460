// What glibc and libstdc++ gained after the versions that manylinux_2_28 allows, and their headers use
// unasked. Linked into a wheel, and not exported.
#include <new>
#include <sstream>

#ifdef __GLIBCXX__
// GLIBCXX_3.4.26: the library had only the constructors with a mode.
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

// GLIBCXX_3.4.29: what an allocator calls when asked for more elements than fit into memory.
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }
#endif

// GLIBC_2.32: whether shared_ptr may count without atomics. It may not: torch has threads.
extern "C" {
char __libc_single_threaded = 0;
}
