// Where a fiber goes on: a stack pointer, or, where there is no switch in assembly, a slower ucontext.
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace consequentialism::cuda::shim {

#if defined(__x86_64__) && !defined(CONSEQUENTIALISM_SHIM_UCONTEXT)

extern "C" void consequentialism_shim_switch(void** save, void* load);
asm(R"(
.text
.hidden consequentialism_shim_switch
.type consequentialism_shim_switch, @function
consequentialism_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size consequentialism_shim_switch, .-consequentialism_shim_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // the return address of entry, which never returns
    *--top = reinterpret_cast<void*>(entry);
    for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
    stack_pointer = top;
  }
  static void exchange(Context& save, Context& load) {
    consequentialism_shim_switch(&save.stack_pointer, load.stack_pointer);
  }
};

#else

struct Context {
  ucontext_t context;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void exchange(Context& save, Context& load) { swapcontext(&save.context, &load.context); }
};

#endif

}  // namespace consequentialism::cuda::shim
