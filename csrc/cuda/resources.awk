# Registers and spilled bytes of each kernel, from what `nvcc --resource-usage` says. Fails if anything spills.
/Compiling entry function/ { split($0, quoted, "'"); kernel = quoted[2]; target = quoted[4] }
/bytes spill stores/ { stack = $1; spilled = $5 + $9 }
/Used [0-9]+ registers/ {
  for (i = 1; i < NF; ++i) if ($i == "Used") registers = $(i + 1)
  gsub(/fastjepa::|\(anonymous namespace\)::|^void /, "", kernel)
  sub(/\(.*/, "", kernel)
  printf "%-8s %-42s %3d registers %5d bytes of stack %5d spilled\n", target, kernel, registers, stack, spilled
  ++kernels
  bad += stack > 0 || spilled > 0
}
END {
  if (!kernels) { print "no kernel was compiled"; exit 1 }
  if (bad) { print bad " kernels use local memory"; exit 1 }
}
