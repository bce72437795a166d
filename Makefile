# Belay. `make help` lists the targets; those that need programs install what
# is missing (see scripts/deps).

GO       ?= go
BIN      := bin
VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS  := -s -w -X main.version=$(VERSION)
# Further flags, such as TESTFLAGS='-run TestBadInput -v', BENCHFLAGS='-only daemon'.
TESTFLAGS  ?=
BENCHFLAGS ?=
# The packages with tests in labs. Two at a time, and as many tests of each as there are
# processors: emulated guests want a good part of one each.
LABS = $(sort $(dir $(shell grep -rlE --include='*_test.go' 'BELAY_LAB|"belay/vmtests/(lab|guest|cluster)"' [a-z]* | sed 's,^,./,')))

.DEFAULT_GOAL := help
.PHONY: help deps build demo test test-unit test-page test-long image vmtest vmtest-long box lint bench man completion package clean clean-cache

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

deps: ## install what the lab, the demo and the tests need and is missing (Debian)
	@scripts/deps lab

build: ## build belay, belayd and the lab's programs into bin/ (installs go-libvirt's sources)
	@scripts/deps build
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/... ./vmtests/cmd/...
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/belay-guest # static: guests have any libc, or none

demo: deps build ## four updates of a host with guests, each by another rung, beside plain scripts (needs root, under 8 minutes)
	@BELAY_BIN=$(CURDIR)/$(BIN) exec $(BIN)/demo

test: test-unit deps ## all tests, with real libvirt and QEMU in labs (needs root); those that need no lab first
	BELAY_BIN=$(CURDIR)/$(BIN) $(GO) test -p 2 -timeout 20m $(TESTFLAGS) ./vmtests $(LABS)

test-unit: build ## only the tests that need no lab
	@scripts/deps rules
	BELAY_PROMTOOL=promtool BELAY_LAB=skip $(GO) test -timeout 20m -parallel 8 $(TESTFLAGS) ./...

test-page: ## the status page in a headless Chromium, with JavaScript and without (under 2 minutes)
	@scripts/deps page
	BELAY_BROWSER=$$(command -v chromium-headless-shell || command -v chromium) $(GO) test -count=1 -timeout 5m -run TestInABrowser -v ./agent/page

test-long: deps build ## the long campaigns (two hours)
	BELAY_BIN=$(CURDIR)/$(BIN) BELAY_LONG=1 $(GO) test -timeout 180m -count=1 -v -run '^Test' ./vmtests/ ./vmtests/guest ./vmtests/lab ./agent/ ./notify/...

image: build ## the image of hosts that are whole machines, for vmtest (needs root; two minutes)
	@scripts/deps machine
	@$(BIN)/machine image

vmtest: image ## tests with hosts that are whole machines, the short form: each rung once (needs root; 12 minutes)
	BELAY_MACHINES=1 $(GO) test -timeout 60m -count=1 $(TESTFLAGS) ./vmtests/wholehost

vmtest-long: image ## the same with all that can go wrong: kills at each step, panics, power cuts, boots (an hour)
	BELAY_MACHINES=1 BELAY_LONG=1 $(GO) test -timeout 180m -count=1 -v $(TESTFLAGS) ./vmtests/wholehost

box: image ## a box for Vagrant into bin/box, see Vagrantfile (needs root and vagrant)
	@scripts/deps vagrant
	@$(BIN)/machine box $(BIN)/box

lint: build ## gofmt, vet, staticcheck
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "gofmt would change:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

bench: deps build ## the benchmarks of docs/benchmarks.md (needs root and a quiet machine)
	@BELAY_BIN=$(CURDIR)/$(BIN) exec $(BIN)/bench $(BENCHFLAGS)

man: build ## man pages into bin/man
	@mkdir -p $(BIN)/man && $(BIN)/belay man $(BIN)/man && dist/package/pages $(BIN) $(BIN)/man && ls $(BIN)/man

completion: build ## shell completions into bin/completion
	@mkdir -p $(BIN)/completion && for s in bash zsh fish; do $(BIN)/belay completion $$s >$(BIN)/completion/belay.$$s; done && ls $(BIN)/completion

package: ## .deb and .rpm into bin/packages
	@scripts/deps build
	@dist/package/build $(BIN)/packages

clean: ## remove what was built, and labs that crashed
	@[ ! -d /var/lib/belay-lab ] || $(GO) run ./vmtests/cmd/lab clean
	rm -rf $(BIN) artifacts

clean-cache: ## remove the lab's downloads and caches, when no lab is up
	@for lab in /var/lib/belay-lab/*/; do [ ! -d "$$lab" ] || { echo "clean-cache: lab $$lab is up, and uses the caches" >&2; exit 1; }; done
	@cache=$${BELAY_CACHE:-/var/cache/belay}; [ ! -e $$cache/machines.lock ] || flock -n $$cache/machines.lock true || { echo "clean-cache: hosts that are machines are up, and use the caches" >&2; exit 1; }
	rm -rf $${BELAY_CACHE:-/var/cache/belay} /var/cache/belay-lab
