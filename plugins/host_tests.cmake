# The kernels as the GPU gets them, compiled for the host: see tests/plugins/cuda_on_host/cuda_runtime.h.
set(emulation tests/plugins/cuda_on_host)

function(add_emulation name)
  add_library(${name} STATIC ${emulation}/block.cpp ${emulation}/execution.cpp ${emulation}/fiber.cpp ${emulation}/order.cpp)
  target_include_directories(${name} PUBLIC ${emulation} plugins)
  # Compiling is most of the time that a test takes.
  set_target_properties(${name} PROPERTIES UNITY_BUILD ON)
  target_compile_options(${name} PRIVATE -O1)
  target_compile_options(${name} PUBLIC ${ARGN})
  target_link_options(${name} PUBLIC ${ARGN})
endfunction()

function(add_host_program name emulation source)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE ${emulation})
  # Not less: the programs run for longer than they compile.
  target_compile_options(${name} PRIVATE -Og)
endfunction()

add_emulation(cuda_on_host)
# An access outside of an allocation, or a vector at an address that a GPU refuses, ends the test.
add_emulation(cuda_on_host_checked -fsanitize=address,undefined -fno-sanitize-recover=undefined)
add_emulation(cuda_on_host_ucontext -DCUDA_ON_HOST_UCONTEXT)

foreach(test copy_rows fan_out_rows guided_step qk_norm_rope)
  add_host_program(${test} cuda_on_host_checked plugins/${test}/${test}_test.cpp)
endforeach()
add_host_program(execution cuda_on_host_checked ${emulation}/execution_test.cpp)
add_host_program(execution_ucontext cuda_on_host_ucontext ${emulation}/execution_test.cpp)
foreach(test copy_rows fan_out_rows guided_step qk_norm_rope execution execution_ucontext)
  add_test(NAME ${test} COMMAND ${test})
  # Looking for leaks takes rights that a container may not have.
  set_tests_properties(${test} PROPERTIES ENVIRONMENT ASAN_OPTIONS=detect_leaks=0)
endforeach()
include(plugins/mutants.cmake)
