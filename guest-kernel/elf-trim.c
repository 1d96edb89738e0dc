// SPDX-License-Identifier: Apache-2.0
//
// elf-trim IN OUT: leave out of a vmlinux what a loader need not write.
//
// The linker pads the kernel's text to 2 MiB on both sides of the entry code, and fills the padding
// with int3 that nothing ever executes: 3 MiB that each VM would load, keep and never use. Whole
// pages of padding become holes between segments, whole pages of zeros become the zero-filled tail
// of a segment, and section headers go. The pages that are loaded, and where, stay the same.
//
// The input is our own build's output; whatever is not as expected ends the build.

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4096, MIN_RUN = 8, MAX_SEGMENTS = 128 };

static unsigned char *in;
static size_t in_size;
static Elf64_Phdr out[MAX_SEGMENTS];
static uint64_t from[MAX_SEGMENTS]; // where in the input the segment's bytes are
static int out_count;

static void die(const char *why)
{
	fprintf(stderr, "elf-trim: %s\n", why);
	exit(1);
}

static void check(int ok, const char *why)
{
	if (!ok)
		die(why);
}

// The byte that fills the page, or -1.
static int fill_of(const unsigned char *page)
{
	if ((page[0] != 0 && page[0] != 0xcc) || memcmp(page, page + 1, PAGE - 1) != 0)
		return -1;
	return page[0];
}

static Elf64_Phdr *add(const Elf64_Phdr *segment, uint64_t start, uint64_t size)
{
	Elf64_Phdr *p = &out[out_count];

	check(out_count < MAX_SEGMENTS, "too many segments");
	*p = *segment;
	p->p_vaddr += start;
	p->p_paddr += start;
	p->p_filesz = p->p_memsz = size;
	p->p_align = PAGE;
	from[out_count++] = segment->p_offset + start;
	return p;
}

static void split(const Elf64_Phdr *segment)
{
	uint64_t start = 0, at = 0, end = segment->p_filesz;
	Elf64_Phdr *last = NULL;

	check(segment->p_paddr % PAGE == 0, "a segment does not start on a page");
	while (at + PAGE <= end) {
		int fill = fill_of(in + segment->p_offset + at);
		uint64_t run = at;

		while (fill >= 0 && run + PAGE <= end && fill_of(in + segment->p_offset + run) == fill)
			run += PAGE;
		if (run - at < MIN_RUN * PAGE) {
			at = run > at ? run : at + PAGE;
			continue;
		}
		// A run of zeros needs a segment in front of it whose tail it can be.
		if (fill == 0 && at == start) {
			at = run;
			continue;
		}
		if (at > start)
			last = add(segment, start, at - start);
		if (fill == 0)
			last->p_memsz += run - at;
		start = at = run;
	}
	if (end > start)
		last = add(segment, start, end - start);
	// What lies past the file's bytes (bss) belongs to the last piece.
	if (segment->p_memsz > segment->p_filesz) {
		check(last != NULL, "a segment without bytes in the file");
		last->p_memsz = segment->p_vaddr + segment->p_memsz - last->p_vaddr;
	}
}

int main(int argc, char **argv)
{
	static const unsigned char zeros[PAGE];
	Elf64_Phdr note = { 0 };
	int loads;
	FILE *f;

	check(argc == 3, "usage: elf-trim IN OUT");
	f = fopen(argv[1], "rb");
	check(f != NULL && fseek(f, 0, SEEK_END) == 0, "cannot open the input");
	in_size = ftell(f);
	in = malloc(in_size);
	check(in != NULL && fseek(f, 0, SEEK_SET) == 0 && fread(in, 1, in_size, f) == in_size, "cannot read the input");
	fclose(f);

	Elf64_Ehdr header;
	check(in_size >= sizeof(header), "too short");
	memcpy(&header, in, sizeof(header));
	check(memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && header.e_ident[EI_CLASS] == ELFCLASS64 &&
	      header.e_ident[EI_DATA] == ELFDATA2LSB && header.e_type == ET_EXEC && header.e_machine == EM_X86_64 &&
	      header.e_phentsize == sizeof(Elf64_Phdr), "not a 64-bit x86 executable");
	check(header.e_phoff + (uint64_t)header.e_phnum * sizeof(Elf64_Phdr) <= in_size, "program headers past the end");

	for (int i = 0; i < header.e_phnum; i++) {
		Elf64_Phdr p;

		memcpy(&p, in + header.e_phoff + i * sizeof(p), sizeof(p));
		check(p.p_offset <= in_size && p.p_filesz <= in_size - p.p_offset && p.p_filesz <= p.p_memsz,
		      "a segment past the end");
		if (p.p_type == PT_LOAD)
			split(&p);
		else if (p.p_type == PT_NOTE)
			note = p;
		else
			die("an unexpected kind of segment");
	}
	loads = out_count;
	check(loads < MAX_SEGMENTS, "too many segments");
	check(note.p_type == PT_NOTE, "no note segment");

	// File: headers, then the pieces, each on a page.
	uint64_t place = PAGE;
	check(sizeof(header) + (loads + 1) * sizeof(Elf64_Phdr) <= PAGE, "too many segments");
	for (int i = 0; i < loads; i++) {
		out[i].p_offset = place;
		place += (out[i].p_filesz + PAGE - 1) / PAGE * PAGE;
		if (note.p_offset >= from[i] && note.p_offset + note.p_filesz <= from[i] + out[i].p_filesz && from[loads] == 0) {
			out[loads] = note;
			out[loads].p_offset = out[i].p_offset + (note.p_offset - from[i]);
			from[loads] = 1;
		}
	}
	check(from[loads] == 1, "the notes are in no segment");

	header.e_phoff = sizeof(header);
	header.e_phnum = loads + 1;
	header.e_shoff = header.e_shnum = header.e_shstrndx = 0;

	f = fopen(argv[2], "wb");
	check(f != NULL, "cannot write the output");
	int ok = fwrite(&header, sizeof(header), 1, f) == 1 && fwrite(out, sizeof(out[0]), loads + 1, f) == (size_t)loads + 1;
	uint64_t written = sizeof(header) + (loads + 1) * sizeof(Elf64_Phdr);
	for (int i = 0; i < loads; i++) {
		uint64_t pad = out[i].p_offset - written;

		ok = ok && fwrite(zeros, 1, pad, f) == pad && fwrite(in + from[i], 1, out[i].p_filesz, f) == out[i].p_filesz;
		written = out[i].p_offset + out[i].p_filesz;
	}
	check(fclose(f) == 0 && ok, "cannot write the output");
	return 0;
}
