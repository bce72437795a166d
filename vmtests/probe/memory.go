package probe

import (
	"context"
	"fmt"
	"math/bits"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	pageSize  = 4096
	pageWords = pageSize / 8
	mib       = 1 << 20

	// golden is an odd constant with well mixed bits, so that consecutive
	// words, pages and generations share no long run of bits.
	golden = 0x9e3779b97f4a7c15

	// slice is how often the dirtier wakes: under emulation, 200 times a second is a third
	// of a processor.
	slice = 20 * time.Millisecond
	// backlog is how far the dirtier may fall behind before it forgets: a
	// guest that cannot keep up must not run flat out for minutes afterwards.
	backlog = 100 * time.Millisecond
	// chunk is how many pages are checked or written under one lock.
	chunk = 64
	// badSample is how many bad pages a report names.
	badSample = 8
)

// Memory is the memory ruler: a working set that is dirtied and a fixed part
// that is not.
//
// Word w of page p of generation g holds mix(seed, p, g) + w × golden. What a
// page must hold is so known without a second copy of it, and a page that is
// stale, torn, swapped with another or zeroed differs in (nearly) every word.
// Generations stand in a table of their own. A migration that lost a page
// together with its table page would be consistent page by page; hence the sum
// over the table is compared with a count of writes kept elsewhere.
type Memory struct {
	seed    uint64
	changed chan struct{} // wakes Run, has room for one

	mu      sync.Mutex
	working []uint64 // mmap
	fixed   []uint64 // mmap
	gens    []uint32 // generation of each page of working
	writes  uint64   // sum over gens
	next    uint64   // round-robin position
	rng     uint64

	rate    float64 // bytes per second
	random  bool
	since   time.Duration // monotonic, when the settings were made
	dirtied uint64        // bytes since then
}

// NewMemory maps and fills both parts; sizes are in bytes, rounded down to
// whole pages.
func NewMemory(seed uint64, workingSet, fixed uint64) (*Memory, error) {
	m := &Memory{seed: seed, changed: make(chan struct{}, 1), rng: seed | 1, since: monotonic()}
	f, err := mapWords(fixed/pageSize, 0)
	if err != nil {
		return nil, err
	}
	m.fixed = f
	for p := range fixed / pageSize {
		fill(page(f, p), m.word(p, fixedGeneration))
	}
	if err := m.resize(workingSet / pageSize); err != nil {
		return nil, err
	}
	return m, nil
}

// fixedGeneration is one the working set never reaches, so that no page of the
// one part can pass for a page of the other.
const fixedGeneration = 1 << 40

// Set changes rate, pattern and, unless zero, the size of the working set. A
// new size starts again from generation zero. An error leaves all as it was.
func (m *Memory) Set(c DirtySettings) error {
	if c.RateMiBs < 0 || c.WorkingSetMiB < 0 {
		return fmt.Errorf("dirty %g MiB/s in %d MiB: negative", c.RateMiBs, c.WorkingSetMiB)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if want := uint64(c.WorkingSetMiB) * mib; want != 0 && want != uint64(len(m.working))*8 {
		if err := m.resize(want / pageSize); err != nil {
			return err
		}
	}
	m.rate = c.RateMiBs * mib
	m.random = c.Random
	m.since = monotonic()
	m.dirtied = 0
	select {
	case m.changed <- struct{}{}:
	default: // Run will see it anyhow
	}
	return nil
}

// resize replaces the working set.
func (m *Memory) resize(pages uint64) error {
	w, err := mapWords(pages, uint64(len(m.working))*8)
	if err != nil {
		return err
	}
	if err := unmapWords(m.working); err != nil {
		return err
	}
	m.working = w
	m.gens = make([]uint32, pages)
	m.writes, m.next = 0, 0
	for p := range pages {
		fill(page(w, p), m.word(p, 0))
	}
	return nil
}

// Status tells settings and counters.
func (m *Memory) Status() MemoryStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	return MemoryStatus{
		WorkingSet: uint64(len(m.working)) * 8,
		Fixed:      uint64(len(m.fixed)) * 8,
		RateMiBs:   m.rate / mib,
		Random:     m.random,
		Dirtied:    m.dirtied,
		Dirtying:   monotonic() - m.since,
	}
}

// Run dirties the working set at the set rate until ctx ends.
func (m *Memory) Run(ctx context.Context) {
	var epoch time.Duration // the settings whose budget is being spent
	var spent float64       // bytes, including those forgiven
	for {
		m.mu.Lock()
		if m.rate == 0 {
			m.mu.Unlock()
			// An idle guest is idle: waking up is dear under emulation.
			select {
			case <-ctx.Done():
				return
			case <-m.changed:
			}
			continue
		}
		if epoch != m.since {
			epoch, spent = m.since, 0
		}
		due := m.rate * (monotonic() - m.since).Seconds()
		if most := max(m.rate*backlog.Seconds(), 2*pageSize); due-spent > most {
			spent = due - most
		}
		m.mu.Unlock()
		for due-spent >= pageSize && ctx.Err() == nil {
			n, ok := m.dirty(uint64((due-spent)/pageSize), epoch)
			if !ok {
				break
			}
			spent += float64(n * pageSize)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(slice):
		}
	}
}

// dirty writes up to a chunk of want pages. It reports false when the settings
// are no longer those of epoch or there is nothing to write to.
func (m *Memory) dirty(want uint64, epoch time.Duration) (uint64, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	pages := uint64(len(m.gens))
	if epoch != m.since || pages == 0 {
		return 0, false
	}
	n := min(want, chunk)
	for range n {
		p := m.next
		if m.random {
			m.rng ^= m.rng << 13
			m.rng ^= m.rng >> 7
			m.rng ^= m.rng << 17
			p, _ = bits.Mul64(m.rng, pages)
		} else if m.next++; m.next == pages {
			m.next = 0
		}
		m.gens[p]++
		m.writes++
		fill(page(m.working, p), m.word(p, uint64(m.gens[p])))
	}
	m.dirtied += n * pageSize
	return n, true
}

// Verify checks every word. The dirtier goes on meanwhile, between chunks; so
// the checksum of the working set is only worth comparing while the rate is 0.
func (m *Memory) Verify() MemoryReport {
	start := monotonic()
	var r MemoryReport
	for p := uint64(0); ; p += chunk {
		m.mu.Lock()
		pages := uint64(len(m.gens))
		for i := p; i < min(p+chunk, pages); i++ {
			r.check(page(m.working, i), m.word(i, uint64(m.gens[i])), i, &r.Checksum)
		}
		m.mu.Unlock()
		if p+chunk >= pages {
			break
		}
	}
	// The fixed part comes after the working set in page numbers.
	base := r.Pages
	for p := range uint64(len(m.fixed)) / pageWords {
		m.mu.Lock()
		r.check(page(m.fixed, p), m.word(p, fixedGeneration), base+p, &r.FixedChecksum)
		m.mu.Unlock()
	}
	m.mu.Lock()
	var sum uint64
	for _, g := range m.gens {
		sum += uint64(g)
	}
	r.BadLedger = sum != m.writes
	m.mu.Unlock()
	r.Took = monotonic() - start
	return r
}

// check compares one page with its first expected word and adds what it holds
// to a checksum.
func (r *MemoryReport) check(words []uint64, want, number uint64, sum *uint64) {
	s := *sum
	bad := false
	for _, w := range words {
		s = (bits.RotateLeft64(s, 5) ^ w) * golden
		bad = bad || w != want
		want += golden
	}
	*sum = s
	r.Pages++
	if bad {
		if r.BadPages++; len(r.BadSample) < badSample {
			r.BadSample = append(r.BadSample, number)
		}
	}
}

// Corrupt flips the first bit of a page.
func (m *Memory) Corrupt(c CorruptSettings) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	part := m.working
	if c.Fixed {
		part = m.fixed
	}
	if n := uint64(len(part)) / pageWords; c.Page >= n {
		return fmt.Errorf("corrupt page %d: there are %d", c.Page, n)
	}
	page(part, c.Page)[0] ^= 1
	return nil
}

// word is the first word of page p in generation g.
func (m *Memory) word(p, g uint64) uint64 {
	return mix(m.seed + p*golden + bits.RotateLeft64(g, 32)*0xd6e8feb86659fd93)
}

// mix is the finaliser of splitmix64: each bit out depends on each bit in.
func mix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// fill writes a whole page from its first word.
func fill(words []uint64, w uint64) {
	for i := range words {
		words[i] = w
		w += golden
	}
}

func page(words []uint64, p uint64) []uint64 {
	return words[p*pageWords : (p+1)*pageWords : (p+1)*pageWords]
}

// mapWords maps zeroed pages outside the Go heap: the collector must neither
// scan nor move what is being measured. Credit is how many bytes the caller
// will give back before it touches the new ones.
func mapWords(pages, credit uint64) ([]uint64, error) {
	if pages == 0 {
		return nil, nil
	}
	if free, err := available(); err == nil && pages*pageSize+reserve > free+credit {
		return nil, fmt.Errorf("map %d MiB: only %d MiB are available and %d MiB must stay free",
			pages*pageSize/mib, free/mib, uint64(reserve/mib))
	}
	b, err := unix.Mmap(-1, 0, int(pages*pageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d MiB: %w", pages*pageSize/mib, err)
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), pages*pageWords), nil
}

func unmapWords(w []uint64) error {
	if len(w) == 0 {
		return nil
	}
	if err := unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), len(w)*8)); err != nil {
		return fmt.Errorf("unmap the old working set: %w", err)
	}
	return nil
}
