package agent

import "sync"

// surveys is how many guests and peers are judged at once: as many as there are
// connections to libvirt for such questions.
const surveys = 4

// sideBySide does something for each of some, so many at once, and waits for all. It gives
// one of their errors; that ends none of the others.
func sideBySide[T any](atOnce int, some []T, do func(i int, one T) error) (failed error) {
	var mu sync.Mutex
	var work sync.WaitGroup
	turn := make(chan struct{}, atOnce)
	for i, one := range some {
		turn <- struct{}{}
		work.Go(func() {
			defer func() { <-turn }()
			if err := do(i, one); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = err
			}
		})
	}
	work.Wait()
	return failed
}
