// What goes wrong in a launch: signals of fibers, and what they and other errors are called.
#include <dlfcn.h>
#include <sys/time.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace consequentialism::cuda::shim {

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGVTALRM};
struct sigaction previous_actions[std::size(kSignals)];
alignas(16) unsigned char signal_stack[64 << 10];

void on_signal(int signal, siginfo_t* info, void* context) {
  const bool ours = state.inside && pthread_equal(pthread_self(), state.thread);
  if (ours) {
    state.fault = signal;
    state.fault_address = static_cast<const unsigned char*>(info->si_addr);
    state.fault_known = info->si_code > 0 && info->si_code != SI_KERNEL;
#ifdef __x86_64__
    const auto& registers = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs;
    state.fault_instruction = reinterpret_cast<const unsigned char*>(registers[REG_RIP]);
    state.fault_writes = (registers[REG_ERR] & 2) != 0;
#else
    (void)context;
    state.fault_instruction = nullptr;
#endif
    state.inside = false;
    _longjmp(state.back, 1);
  }
  if (signal == SIGVTALRM && info->si_code == SI_KERNEL) {
    if (state.inside) pthread_kill(state.thread, signal);
    return;
  }
  const auto which = static_cast<size_t>(std::find(std::begin(kSignals), std::end(kSignals), signal) - kSignals);
  const struct sigaction& previous = previous_actions[which];
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
    sigaction(signal, &previous, nullptr);  // and the same instruction faults again
  } else {
    previous.sa_handler(signal);
  }
}

void set_timer(double seconds) {
  itimerval timer{};
  timer.it_value.tv_sec = static_cast<time_t>(seconds);
  timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - floor(seconds)) * 1e6);
  if (seconds > 0) timer.it_interval.tv_sec = 1;  // again, in case it finds no fiber running
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

bool describe_address(const Region& region, const std::string& name, const unsigned char* address, std::string* text) {
  if (region.map == nullptr || address < region.map || address >= region.map + region.map_bytes) return false;
  *text = describe("at byte %td of the %zu of ", address - region.base, region.bytes) + name;
  return true;
}

}  // namespace

SignalGuard::SignalGuard() {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &previous_stack_);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
  set_timer(state.seconds_allowed);
}

SignalGuard::~SignalGuard() {
  set_timer(0);
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
  sigaltstack(&previous_stack_, nullptr);
}

std::string describe(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return text;
}

std::string describe(const Where& where) {
  const char* slash = strrchr(where.file_name(), '/');
  return describe("%s:%u", slash ? slash + 1 : where.file_name(), static_cast<unsigned>(where.line()));
}

std::string describe(const uint3& index) {
  return describe("(%u, %u, %u)", index.x, index.y, index.z);
}

std::string describe(const Fiber& fiber) {
  return "block " + describe(fiber.block->index) + " thread " + describe(fiber.thread);
}

// "+0x..." from the start of this library, which the Python side hands to addr2line.
std::string describe_code(const void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0) return describe("%p", address);
  return describe(
      "+0x%zx", static_cast<size_t>(static_cast<const char*>(address) - static_cast<char*>(info.dli_fbase)));
}

[[noreturn]] void fail_with(cudaError_t error, const std::string& what) {
  state.error = error;
  state.message = what;
  if (state.current != nullptr) state.message += ", " + describe(*state.current);
  state.inside = false;
  _longjmp(state.back, 1);
}

std::string describe_address(const unsigned char* address) {
  std::string text;
  for (const Region& region : state.buffers) {
    if (describe_address(region, "'" + region.name + "'", address, &text)) return text;
  }
  for (size_t i = 0; i < state.shared.size(); ++i) {
    std::string name = "shared memory";
    if (i < state.blocks.size() && &state.blocks[i] != state.current->block) {
      name += " of block " + describe(state.blocks[i].index);
      if (!state.blocks[i].started) name += ", which does not run yet";
      if (state.blocks[i].live == 0) name += ", which has exited";
    }
    if (describe_address(state.shared[i], name, address, &text)) return text;
  }
  if (describe_address(state.stacks, "", address, &text)) return "on the stack, which has only 60 KB";
  return describe("at %p, in no buffer", static_cast<const void*>(address));
}

void explain_fault() {
  std::string what;
  state.error = cudaErrorIllegalAddress;
  if (state.fault == SIGVTALRM) {
    state.error = cudaErrorLaunchTimeout;
    what = describe("no end after %g s of processor time", state.seconds_allowed);
  } else if (state.fault == SIGILL) {
    state.error = cudaErrorMisalignedAddress;
    what = "undefined behaviour: a misaligned address, an index beyond its array, a shift or an overflow";
  } else if (state.fault == SIGFPE) {
    state.error = cudaErrorLaunchFailure;
    what = "division by zero";
  } else if (!state.fault_known) {
    what = "misaligned or impossible address";
  } else {
#ifdef __x86_64__
    what = state.fault_writes ? "write " : "read ";
#else
    what = "access ";
#endif
    what += describe_address(state.fault_address);
  }
  if (state.fault_instruction != nullptr) what += " at " + describe_code(state.fault_instruction);
  state.message = what + ", " + describe(*state.current);
}

void explain_deadlock() {
  state.error = cudaErrorLaunchFailure;
  std::vector<const Fiber*> examples;
  size_t waiting = 0;
  for (const Fiber& fiber : state.fibers) {
    if (fiber.exited) continue;
    ++waiting;
    const bool known = std::any_of(examples.begin(), examples.end(), [&](const Fiber* other) {
      return other->where.line() == fiber.where.line() && strcmp(other->waits_in, fiber.waits_in) == 0;
    });
    if (!known && examples.size() < 4) examples.push_back(&fiber);
  }
  state.message = describe("deadlock: %zu of %zu threads wait", waiting, state.fibers.size());
  for (const Fiber* fiber : examples) {
    state.message += "; " + describe(*fiber) + " in " + fiber->waits_in + " at " + describe(fiber->where);
  }
}

bool buffers_whole() {
  for (const Region& region : state.buffers) {
    ptrdiff_t offset;
    if (region.spoilt(&offset)) {
      state.error = cudaErrorIllegalAddress;
      state.message = describe("write at byte %td of the %zu of '%s'", offset, region.bytes, region.name.c_str());
      return false;
    }
  }
  return true;
}

void fail(cudaError_t error, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fail_with(error, text);
}

}  // namespace consequentialism::cuda::shim

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchTimeout:
      return "the launch timed out and was terminated";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
  }
  return "unrecognized error code";
}
