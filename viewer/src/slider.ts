// The line between two images, which drags and takes arrow keys.

export class Slider {
  share: number | null = null;

  constructor(
    private readonly handle: HTMLElement,
    private readonly onMove: (share: number | null) => void,
    private readonly onEnd: () => void,
  ) {
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      event.preventDefault();
      handle.focus({ preventScroll: true });
    });
    handle.addEventListener("pointermove", (event) => {
      if (handle.hasPointerCapture(event.pointerId)) this.set(event.clientX / handle.parentElement!.clientWidth);
    });
    handle.addEventListener("pointerup", () => this.onEnd());
    handle.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      this.set((this.share ?? 0.5) + step);
      this.onEnd();
    });
  }

  set(share: number | null): void {
    this.share = share === null ? null : Math.min(Math.max(share, 0), 1);
    this.handle.hidden = this.share === null;
    if (this.share !== null) {
      this.handle.style.left = `${this.share * 100}%`;
      this.handle.setAttribute("aria-valuenow", String(Math.round(this.share * 100)));
    }
    this.onMove(this.share);
  }
}
