# A guest without an operating system, for KVM: it counts in memory that proves itself.
#
# QEMU starts it by its PVH note, in 32-bit protected mode without paging (Xen's docs/misc/pvh.pandoc). Each of CPUS processors
# has MIB MiB, in which every page holds the number of the pass (at offset 0) and its own address (at offset 4). A pass goes
# through the pages in order and raises the number by one: so memory shows at most one step at any moment, and a page that is
# lost, stale or in the wrong place is found in the next pass. That is the idea of QEMU's own migration test.
#
# COM1 says `READY`, then `PASS` with each processor's number of passes, and `BAD` with the address and what was found there.
#
# Assembled with --defsym CPUS=N --defsym MIB=N.

        .intel_syntax noprefix

        .set COM1, 0x3f8
        .set LSR, COM1 + 5              # line status: bit 5 says that the next byte may be written
        .set LAPIC, 0xfee00000
        .set SPURIOUS, LAPIC + 0xf0
        .set ICR, LAPIC + 0x300
        .set INIT_ALL_OTHERS, 0x000c4500
        .set START_ALL_OTHERS, 0x000c4608 # at page 8
        .set TRAMPOLINE, 0x8000
        .set FIRST, 0x1000000           # 16 MiB: behind firmware and program
        .set PAGE, 4096
        .set STACK, 1024

        .macro flat                     # segments that are all of memory
        mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov ss, ax
        .endm

        .section .note.pvh, "a", @note
        .long 4, 4, 18                  # XEN_ELFNOTE_PHYS32_ENTRY
        .asciz "Xen"
        .long start

        .text
        .code32
        .global start
start:
        cli
        cld
        lgdt [gdt_pointer]
        ljmp 0x08:1f
1:      flat
        lea esp, [stacks + STACK]
        xor ebp, ebp
        .if CPUS > 1
        call start_others
        .endif
        call mark
        lea esi, [ready]
        call print
        jmp work

# Every other processor begins here.
other:
        flat
        mov ebp, 1
        lock xadd [started], ebp        # its index
        mov eax, ebp
        shl eax, 10
        lea esp, [eax + stacks + STACK]
        call mark
        jmp work

# Passes, for good. ebp: index; edx: what each page must hold.
work:
        xor edx, edx
pass:
        call range
1:      mov eax, [esi]
        cmp eax, edx
        jne 2f
        cmp [esi + 4], esi
        jne 2f
        inc eax
        mov [esi], eax
        add esi, PAGE
        dec ecx
        jnz 1b
        inc edx
        mov [passes + ebp * 4], edx
        test ebp, ebp
        jnz pass
        call tell
        jmp pass
2:      mov [bad_found], eax
        mov [bad_at], esi               # last: whoever sees it reads the other
3:      test ebp, ebp
        jnz 3b
        call tell
        jmp 3b

# Every page gets its address, and is at pass 0.
mark:
        call range
1:      mov dword ptr [esi], 0
        mov [esi + 4], esi
        add esi, PAGE
        dec ecx
        jnz 1b
        ret

# esi, ecx: first page and number of pages of this processor.
range:
        mov esi, MIB << 20
        imul esi, ebp
        add esi, FIRST
        mov ecx, MIB << 8
        ret

# Processor 0 alone prints.
tell:
        lea esi, [pass_word]
        call print
        xor ebx, ebx
1:      mov eax, [passes + ebx * 4]
        call hex
        inc ebx
        cmp ebx, CPUS
        jne 1b
        mov al, '\n'
        call put
        cmp dword ptr [bad_at], 0
        je 2f
        lea esi, [bad_word]
        call print
        mov eax, [bad_at]
        call hex
        mov eax, [bad_found]
        call hex
        mov al, '\n'
        call put
2:      ret

print:
        lodsb
        test al, al
        jz 1f
        call put
        jmp print
1:      ret

# A space and eax in eight digits.
hex:
        mov edi, eax
        mov al, ' '
        call put
        mov ecx, 8
1:      rol edi, 4
        mov eax, edi
        and eax, 15
        mov al, [digits + eax]
        call put
        dec ecx
        jnz 1b
        ret

put:
        push edx
        mov ah, al
        mov dx, LSR
1:      in al, dx
        test al, 0x20
        jz 1b
        mov dx, COM1
        mov al, ah
        out dx, al
        pop edx
        ret

# INIT, START, START, as Intel's manual (3A, 9.4.4) has it.
start_others:
        lea esi, [trampoline]
        mov edi, TRAMPOLINE
        mov ecx, offset trampoline_end - trampoline
        rep movsb
        or dword ptr [SPURIOUS], 0x100  # enables it
        mov dword ptr [ICR], INIT_ALL_OTHERS
        call pause
        mov dword ptr [ICR], START_ALL_OTHERS
        call pause
1:      cmp dword ptr [started], CPUS
        jne 1b
        ret

# An access to this port takes a microsecond or more on any machine.
pause:
        mov ecx, 20000
1:      in al, 0x80
        dec ecx
        jnz 1b
        ret

        .code16
trampoline:
        cli
        xor ax, ax
        mov ds, ax
        data32 lgdt [TRAMPOLINE + trampoline_gdt - trampoline]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        data32 ljmp 0x08:other
trampoline_gdt:
        .word gdt_end - gdt - 1
        .long gdt
trampoline_end:

        .balign 8
gdt:
        .quad 0
        .quad 0x00cf9b000000ffff        # code: all of it, 32 bits
        .quad 0x00cf93000000ffff        # data
gdt_end:
gdt_pointer:
        .word gdt_end - gdt - 1
        .long gdt

ready:     .asciz "READY\n"
pass_word: .asciz "PASS"
bad_word:  .asciz "BAD"
digits:    .ascii "0123456789abcdef"

        .balign 4
started:   .long 1
bad_at:    .long 0
bad_found: .long 0
passes:    .fill CPUS, 4, 0
        .balign 16
stacks:    .fill CPUS * STACK, 1, 0
